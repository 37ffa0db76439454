"""One segment of memory per version and trainer rank, mapped by every engine of the host.

On Linux a segment is an anonymous file (memfd) that the trainer holds open and engines open as `/proc/<pid>/fd/<n>`: it
needs no room in /dev/shm, which containers keep small, and is gone when the last process that uses it is, however the
run ended. Elsewhere segments are files in a folder of the system's temporary directory.

The newest `KEPT` versions exist at a time, so that a lost `retire` cannot fill the memory; an engine that asks for an
older one is told that it is gone and catches up with the newest.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import attrs
from prl.errors import InfrastructureError, UserError
from prl.providers import WeightSender
from prl.types import Manifest
from prl.weights.tensors import inside, read_tensors, write_atomically, write_raw
from torch import Tensor

from prl_shared_memory import SharedMemoryConfig, cuda, device

KEPT = 3
_DESCRIPTOR = re.compile(r"/proc/[0-9]+/fd/[0-9]+")


@attrs.define
class MemorySender:
    """Trainer side where there are anonymous files."""

    _held: dict[int, BinaryIO] = attrs.field(factory=dict)

    def send(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> Manifest:
        """Write a version while the tensors come; the oldest beyond `KEPT` goes."""
        self.retire(version)
        file = self._held[version] = os.fdopen(os.memfd_create(_segment_name(version)), "wb")
        manifest = Manifest.single(
            version=version,
            location=f"/proc/{os.getpid()}/fd/{file.fileno()}",
            tensors=write_raw(file, tensors),
        )
        for old in sorted(self._held)[:-KEPT]:
            self.retire(old)
        return manifest

    def retire(self, version: int) -> None:
        if version in self._held:
            self._held.pop(version).close()

    def close(self) -> None:
        for version in list(self._held):
            self.retire(version)


@attrs.frozen
class FileSender:
    """Trainer side elsewhere; owns the folder, and empties it of what an earlier attempt of the run left."""

    folder: Path

    def __attrs_post_init__(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.mkdir(mode=0o700, parents=True)
        except FileExistsError:
            raise InfrastructureError(f"{self.folder} belongs to someone else; remove it or move the run") from None

    def send(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> Manifest:
        """As `MemorySender.send`."""
        path = self._path(version)
        records = write_atomically(path, write_raw, tensors)
        manifest = Manifest.single(version=version, location=str(path), tensors=records)
        held = sorted(int(p.name.removeprefix("version-")) for p in self.folder.iterdir())
        for old in held[:-KEPT]:
            self.retire(old)
        return manifest

    def retire(self, version: int) -> None:
        self._path(version).unlink(missing_ok=True)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, version: int) -> Path:
        return self.folder / f"version-{version}"


@attrs.frozen
class SharedMemoryReceiver:
    """Engine side."""

    folder: Path
    """Where the `FileSender`s of the run write."""
    gpu: device.Device = attrs.field(factory=cuda.Cuda)

    def fetch(self, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
        what = f"weights of version {manifest.version}"
        for part in manifest.parts:
            if not _DESCRIPTOR.fullmatch(part.location):
                yield from read_tensors(inside(self.folder, part.location, what=what), part.tensors, what=what)
                continue
            path = Path(part.location)
            if _is_open(path, _segment_name(manifest.version)):
                yield from read_tensors(path, part.tensors, what=what)
            elif _is_open(path, f"{device.NAME}{manifest.version}"):
                if missing := cuda.problem():
                    raise InfrastructureError(f"{what} wait on a GPU, and {missing}")
                yield from device.fetch(self.gpu, path, part.tensors, what=what)
            else:
                raise InfrastructureError(f"{what}: {path} is gone")

    def close(self) -> None:
        """Nothing is held: each tensor keeps the map it lies in, or is a copy."""


def send(config: SharedMemoryConfig, run_dir: Path, rank: int) -> WeightSender:
    """UserError where this process lacks what the config asks for."""
    if config.memory == "device":
        if missing := cuda.problem():
            raise UserError(f'weights.memory = "device" needs a GPU here, and {missing}; choose "host"')
        return device.DeviceSender(cuda.Cuda())
    if hasattr(os, "memfd_create"):
        return MemorySender()
    return FileSender(_folder(run_dir) / f"rank-{rank}")


def receive(config: SharedMemoryConfig, run_dir: Path) -> SharedMemoryReceiver:
    return SharedMemoryReceiver(_folder(run_dir))


def _folder(run_dir: Path) -> Path:
    run = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"prl-{run}"


def _segment_name(version: int) -> str:
    return f"prl-version-{version}"


def _is_open(link: Path, name: str) -> bool:
    """Descriptors are numbered anew: what the trainer has open there now may be something else, or a later version."""
    try:
        return os.readlink(link).startswith(f"/memfd:{name} ")
    except FileNotFoundError:
        return False
