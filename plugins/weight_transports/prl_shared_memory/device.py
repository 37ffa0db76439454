"""A version in the memory of the trainer's GPU, read from there by the engines of its host.

    trainer's rank ── copies its part ──► segments of device memory, and a list of their handles in an anonymous file
    worker         ── opens /proc/<pid>/fd/<n>, the part's location ──► the list
                   ── opens the segments, copies what it loads to its own GPU, the same or a peer, and closes them
                   ── verifies its copies

The newest `KEPT` versions exist at a time; the memory of an older one is written over by the next. Nobody is asked
whether it is still read: a worker that reads too late finds that its copy has another checksum, and catches up with the
newest version. So a worker that is killed holds nothing up, and segments stay until the trainer's process ends:
memory that another process has open must not be given back (cudaIpcGetMemHandle).
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import attrs
from prl.errors import InfrastructureError
from prl.types import Manifest, TensorRecord
from prl.weights import crc
from prl.weights.tensors import lots, record_of, round_up, verified_on_device
from torch import Tensor

from prl_shared_memory.cuda import Segment

KEPT = 2
"""One that engines fetch while the next is written."""
SEGMENT = 256 << 20
NAME = "prl-device-version-"


class Device(Protocol):
    """Memory that processes share (`cuda.Cuda`)."""

    def allocate(self, nbytes: int) -> Segment: ...

    def open(self, handle: bytes) -> int: ...

    def close(self, address: int) -> None: ...

    def copy(self, address: int, nbytes: int) -> Tensor: ...

    def stream(self) -> Any: ...


# --- trainer side -----------------------------------------------------------------------------------------------------
@attrs.define(eq=False)
class Room:
    """Of one version at a time; places count from 0 as if all segments were one piece."""

    _device: Device
    segments: list[Segment] = attrs.field(factory=list)
    _index: int = 0
    _used: int = 0

    def hold(self, tensors: Iterable[tuple[str, Tensor]]) -> tuple[TensorRecord, ...]:
        """Copy these over what was here; done when this returns."""
        self._index = self._used = 0
        found: list[tuple[str, Tensor, int]] = []
        for name, tensor in tensors:
            offset, room = self._take(tensor.nbytes)
            copy = room.view(tensor.dtype).view(tensor.shape)
            copy.copy_(tensor.detach())
            found.append((name, copy, offset))
        checksums = crc.of_tensors([copy for _, copy, _ in found])
        return tuple(record_of(*one, checksum) for one, checksum in zip(found, checksums, strict=True))

    def _take(self, nbytes: int) -> tuple[int, Tensor]:
        start = round_up(self._used)
        while self._index < len(self.segments) and start + nbytes > len(self.segments[self._index].content):
            self._index, start = self._index + 1, 0
        if self._index == len(self.segments):
            last = len(self.segments[-1].content) if self.segments else 0
            size = max(nbytes, min(SEGMENT, 2 * last), 1 << 20)
            self.segments.append(self._device.allocate(round_up(size)))
        self._used = start + nbytes
        first = sum(len(segment.content) for segment in self.segments[: self._index])
        return first + start, self.segments[self._index].content[start : self._used]


@attrs.define(eq=False)
class DeviceSender:
    """One trainer rank's part of every version."""

    _device: Device
    _held: dict[int, tuple[BinaryIO, Room]] = attrs.field(factory=dict)
    _spare: list[Room] = attrs.field(factory=list)

    def send(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> Manifest:
        """Copy a version; the oldest beyond `KEPT` goes first, and its memory is used."""
        self.retire(version)
        for old in sorted(self._held)[: len(self._held) + 1 - KEPT]:
            self.retire(old)
        room = self._spare.pop() if self._spare else Room(self._device)
        try:
            records = room.hold(tensors)
            file = os.fdopen(os.memfd_create(f"{NAME}{version}"), "wb")
        except BaseException:
            self._spare.append(room)
            raise
        segments = [{"handle": one.handle.hex(), "nbytes": len(one.content)} for one in room.segments]
        file.write(json.dumps(segments).encode())
        file.flush()
        self._held[version] = file, room
        location = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        return Manifest.single(version=version, location=location, tensors=records)

    def retire(self, version: int) -> None:
        if version in self._held:
            file, room = self._held.pop(version)
            file.close()
            self._spare.append(room)

    def close(self) -> None:
        for version in list(self._held):
            self.retire(version)


# --- engine side ------------------------------------------------------------------------------------------------------
def fetch(device: Device, path: Path, records: Sequence[TensorRecord], *, what: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a part, verified, on this thread's device.

    Raises:
        InfrastructureError: the trainer is gone, has the version no more, or its bytes are not those that were sent.
    """
    handles, starts = _listed(path, what)
    opened: dict[int, int] = {}
    try:
        for lot in lots(records, starts):
            index = bisect_right(starts, lot[0].offset) - 1
            start, end = lot[0].offset, lot[-1].offset + lot[-1].nbytes
            if not 0 <= index < len(handles) or end > starts[index + 1]:
                raise InfrastructureError(f"{what}: bytes {start} to {end} are not in one of {len(handles)} segments")
            if index not in opened:
                opened[index] = device.open(handles[index])
            with device.stream():
                content = device.copy(opened[index] + start - starts[index], end - start)
                tensors = list(verified_on_device(content, lot, what=what, start=start))
            yield from tensors
    except InfrastructureError as error:
        text = str(error)
        raise InfrastructureError(
            text if text.startswith(what) else f"{what} did not come from {path}: {text}"
        ) from error
    finally:
        for address in opened.values():
            device.close(address)


def _listed(path: Path, what: str) -> tuple[list[bytes], list[int]]:
    """Handles of the segments, and where they start; one more start is the end."""
    try:
        segments = [(bytes.fromhex(one["handle"]), int(one["nbytes"])) for one in json.loads(path.read_bytes())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InfrastructureError(f"{what}: the list of segments in {path} cannot be read: {error}") from error
    return [handle for handle, _ in segments], list(accumulate((nbytes for _, nbytes in segments), initial=0))
