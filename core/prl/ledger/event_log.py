"""The file of events: append-only records, each with a checksum, so that what a kill cut short is told from damage.

    events/launch-N.log         magic, then records: length, crc32, time (seconds since the epoch), content
    events/launch-N.columns/    large columns of the groups that arrived, as hard links (`run.event_log = "all"`)

A record's content is an event as the wire encodes it, its frames one after the other, deflated: masks and versions
shrink to nothing, and some 8 bytes a token are left for its id and log-probability. Nothing is pickled. Written by the
ledger's thread, a launch's file by one process; read while it grows, and after a kill, up to its last whole record.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import attrs

from prl import wire
from prl.columns import ColumnFolder, named_by
from prl.compose import toml
from prl.compose.compose import attempt_table
from prl.errors import RunError
from prl.ledger.events import EVENTS, Arrived, Begun, Event, event_of
from prl.ledger.facts import Fact
from prl.run_dir import RunDir
from prl.types import Group

MAGIC = b"prl events 1\n"
_HEAD = struct.Struct("<QId")  # bytes of the content; crc32 of time and content; time
_TIME = struct.Struct("<d")
_LEVEL = 1  # zlib's fastest: log-probabilities are noise to any level


class LogDamagedError(RunError):
    """A record in the middle of a log is not what was written."""


def path_of(run_dir: RunDir, launch: int) -> Path:
    return run_dir.events / f"launch-{launch}.log"


def columns_of(run_dir: RunDir, launch: int) -> Path:
    return run_dir.events / f"launch-{launch}.columns"


# --- writing ----------------------------------------------------------------------------------------------------------
@attrs.define(eq=False)
class EventLog:
    """The log of one launch. Every call blocks on the disk, and raises OSError where it cannot be written."""

    run_dir: RunDir
    keep: Literal["tokens", "all"]
    _file: BinaryIO | None = attrs.field(init=False, default=None)
    _launch: int = attrs.field(init=False, default=0)

    def begin(self, launch: int, at: float) -> None:
        """Open the file of a launch, and say what was launched."""
        self.run_dir.events.mkdir(exist_ok=True)
        self._launch = launch
        self._file = path_of(self.run_dir, launch).open("wb")
        self._file.write(MAGIC)
        config, lock = toml.dumps(attempt_table(self.run_dir)), self.run_dir.lock.read_text()
        self._file.write(record(at, Begun(launch=launch, config=config, lock=lock)))
        self._file.flush()

    def append(self, entries: Sequence[tuple[float, Fact]]) -> None:
        """What the log keeps of these (time, fact) pairs; all of it has left the process when this returns."""
        assert self._file is not None, "it was begun"
        for at, fact in entries:
            event = event_of(fact)
            if event is None:
                continue
            if isinstance(event, Arrived) and event.admitted and self.keep == "all":
                self._keep_columns(event.group)
            self._file.write(record(at, event))
        self._file.flush()

    def sync(self) -> None:
        """Have it on the disk, as a checkpoint that is about to be complete."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _keep_columns(self, group: Group) -> None:
        if names := named_by([group]):
            ColumnFolder(self.run_dir.columns).lend(names, columns_of(self.run_dir, self._launch))


def record(at: float, event: Event) -> bytes:
    """An event as it lies in the file."""
    deflate = zlib.compressobj(_LEVEL)
    frames = wire.join(wire.encode(event))
    content = b"".join([*(deflate.compress(frame) for frame in frames), deflate.flush()])
    return _HEAD.pack(len(content), zlib.crc32(content, zlib.crc32(_TIME.pack(at))), at) + content


# --- reading ----------------------------------------------------------------------------------------------------------
def read(path: Path) -> Iterator[tuple[float, Event]]:
    """(time, event) of every whole record, in order; what a kill cut short at the end is left out.

    LogDamagedError when a record is not what was written, RunError when the file is no event log.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise RunError(f"{path} is no event log that this prl reads")
        size = os.fstat(file.fileno()).st_size
        while (start := file.tell()) + _HEAD.size <= size:
            length, checksum, at = _HEAD.unpack(file.read(_HEAD.size))
            end = start + _HEAD.size + length
            if end > size:
                return
            content = file.read(length)
            if zlib.crc32(content, zlib.crc32(_TIME.pack(at))) != checksum:
                if end == size:  # the last record may have been on its way when the machine stopped
                    return
                raise LogDamagedError(f"{path} is damaged: the record at byte {start} is not what was written")
            yield at, _event(content, path, start)


def _event(content: bytes, path: Path, start: int) -> Event:
    try:
        (frames,) = wire.split(memoryview(zlib.decompress(content)))
        event: Event = wire.decode(frames, EVENTS)
    except (ValueError, zlib.error, wire.WireError) as error:
        raise LogDamagedError(f"{path} has a record at byte {start} that is no event: {error}") from None
    return event
