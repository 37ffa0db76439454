"""The files of a checkpoint, what they must hold, and whether they still do.

    checkpoints/step-N.partial/      while it is written; nobody reads it
    checkpoints/step-N/              complete: renamed once everything is on disk
        manifest.json                step, identity of the config, size and checksum of every other file
        controller.json              written by `prl.dispatch.checkpoint`, with pending.groups
        columns/                     large columns of those groups
        in-flight/                   what is finished of other groups (`prl.rollout.carried`)
        trainer/rank-<r>.*           written by `prl.train.checkpoint`

A checksum is the crc32 that `zlib` computes, taken while the file is written: it tells what a disk or a copy did to it.
Whoever reads a part verifies that part. Knows nothing of tensors or tasks; used by the command line before anything is
started, the controller and the trainer ranks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import attrs
import cattrs

from prl.errors import CheckpointError

FORMAT = 4
MANIFEST = "manifest.json"
CONTROLLER_FILES = STATE, GROUPS = "controller.json", "pending.groups"
"""The controller's part of a checkpoint."""
COLUMNS = "columns"
"""Folder of the large columns that the groups in it refer to."""
IN_FLIGHT = "in-flight"
"""Folder of what is finished of other groups, a file for each place where groups are rolled out."""
_READ_BYTES = 1 << 22


@attrs.frozen(kw_only=True)
class FileRecord:
    """What a file must hold."""

    nbytes: int
    checksum: int
    """zlib.crc32 of the bytes."""


@attrs.frozen(kw_only=True)
class CheckpointManifest:
    """`manifest.json`."""

    format: int
    step: int
    identity: Mapping[str, Any]
    """Dotted path -> value of every setting that the weights and the optimizer's state depend on."""
    files: Mapping[str, FileRecord]
    """Path relative to the checkpoint -> what it must hold."""


class RecordedFile:
    """A new file that is on disk when it is closed, and knows its record then.

    Example:
        >>> with RecordedFile(folder / "state.bin") as file:
        ...     file.write(b"abc")
        >>> file.record.nbytes
        3
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._nbytes = 0
        self._checksum = 0

    def write(self, content: bytes | memoryview) -> int:
        self._checksum = zlib.crc32(content, self._checksum)
        self._nbytes += memoryview(content).nbytes
        return self._file.write(content)

    def tell(self) -> int:
        return self._nbytes

    @property
    def record(self) -> FileRecord:
        return FileRecord(nbytes=self._nbytes, checksum=self._checksum)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())


def write_json(path: Path, value: Any) -> FileRecord:
    """Write a value into a new file, to the disk."""
    with RecordedFile(path) as file:
        file.write(json.dumps(value, indent=1).encode())
    return file.record


def record_of(file: Path) -> FileRecord:
    """The record of a file that somebody else has written; it is on the disk then."""
    with file.open("rb") as content:
        os.fsync(content.fileno())
    return FileRecord(nbytes=file.stat().st_size, checksum=_checksum(file))


# --- writing ----------------------------------------------------------------------------------------------------------
def partial(path: Path) -> Path:
    """Where the checkpoint `path` lies until it is complete."""
    return path.with_name(f"{path.name}.partial")


def commit(path: Path, manifest: CheckpointManifest) -> None:
    """Write the manifest beside the files it names and make the checkpoint complete; one of that step gives way."""
    write_json(partial(path) / MANIFEST, cattrs.unstructure(manifest))
    shutil.rmtree(path, ignore_errors=True)
    partial(path).rename(path)


def prune(folder: Path, *, keep_last: int, keep_every: int) -> None:
    """Remove all but the newest `keep_last` (0: keep all) and those of every `keep_every`th step (0: none)."""
    for path in complete(folder)[:-keep_last] if keep_last else []:
        if not keep_every or step_of(path) % keep_every:
            shutil.rmtree(path)


# --- finding ----------------------------------------------------------------------------------------------------------
def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's folder of checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


# --- reading ----------------------------------------------------------------------------------------------------------
def read_manifest(path: Path) -> CheckpointManifest:
    """The manifest of a complete checkpoint; CheckpointError says why there is none."""
    file = path / MANIFEST
    try:
        content = json.loads(file.read_text())
        seen = content["format"]
        manifest = cattrs.structure(content, CheckpointManifest) if seen == FORMAT else None
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is no complete checkpoint: it has no {MANIFEST}; name a folder step-N of a run's checkpoints"
        ) from None
    except (ValueError, TypeError, LookupError, cattrs.BaseValidationError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); {_REMEDY}") from None
    if manifest is None:
        raise CheckpointError(
            f"checkpoint {path} has format {seen!r}, this prl reads {FORMAT}; use the prl that wrote it"
        )
    return manifest


def check_identity(path: Path, manifest: CheckpointManifest, identity: Mapping[str, Any]) -> None:
    """CheckpointError with every setting that differs between the checkpoint's config and this one."""
    there, here = manifest.identity, json.loads(json.dumps(identity))
    names = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    if names:
        lines = "\n".join(f"  {name}: {_shown(there, name)} there, {_shown(here, name)} here" for name in names)
        raise CheckpointError(
            f"checkpoint {path} belongs to another config:\n{lines}\n"
            "Give this config the same values, or start from a checkpoint that has them."
        )


def check_sizes(path: Path, manifest: CheckpointManifest) -> None:
    """CheckpointError for a file that is missing or has another size: what can be seen without reading it."""
    for name, record in manifest.files.items():
        _check_size(path / name, record)


def check_size(path: Path, manifest: CheckpointManifest, name: str) -> None:
    """CheckpointError unless this file is there and has its size."""
    _check_size(path / name, _record(path, manifest, name))


def verify(path: Path, manifest: CheckpointManifest, names: Iterable[str]) -> None:
    """Read these files of a checkpoint; CheckpointError names the first that is not what was written."""
    for name in names:
        record = _record(path, manifest, name)
        _check_size(path / name, record)
        checksum = _checksum(path / name)
        if checksum != record.checksum:
            raise CheckpointError(
                f"{path / name} is damaged: its checksum is {checksum:08x} where {record.checksum:08x} was written; "
                f"{_REMEDY}"
            )


def _record(path: Path, manifest: CheckpointManifest, name: str) -> FileRecord:
    record = manifest.files.get(name)
    if record is None:
        raise CheckpointError(f"checkpoint {path} has no {name}: its {MANIFEST} does not list it")
    return record


def _check_size(file: Path, record: FileRecord) -> None:
    try:
        nbytes = file.stat().st_size
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: the checkpoint had it when it was written; {_REMEDY}") from None
    if nbytes != record.nbytes:
        raise CheckpointError(f"{file} is damaged: it has {nbytes} bytes where {record.nbytes} were written; {_REMEDY}")


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as content:
        while chunk := content.read(_READ_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _shown(identity: Mapping[str, Any], name: str) -> str:
    return repr(identity[name]) if name in identity else "absent"


_REMEDY = "restore it from a copy, or remove this checkpoint to continue from the one before"
