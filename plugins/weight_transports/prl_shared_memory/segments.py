"""One memory-backed file per version, `/dev/shm/prl-<run>/version-<n>`, mapped by every engine of the host.

Where there is no /dev/shm (macOS) the files lie in the system's temporary folder. The newest `KEPT` versions exist at a
time, so that a lost `retire` cannot fill the memory; an engine that asks for an older one is told that it is gone and
catches up with the newest.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs
from prl.errors import InfrastructureError
from prl.types import Manifest
from prl.weights.tensors import read_tensors, write_raw
from torch import Tensor

from prl_shared_memory import SharedMemoryConfig

KEPT = 3


@attrs.frozen
class SharedMemorySender:
    """Trainer side; owns the folder, and empties it of what an earlier attempt of the run left."""

    folder: Path

    def __attrs_post_init__(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.mkdir(mode=0o700, parents=True)
        except FileExistsError:
            raise InfrastructureError(f"{self.folder} belongs to someone else; remove it or move the run") from None

    def send(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> Manifest:
        """Write a version while the tensors come; the oldest beyond `KEPT` goes."""
        path = self._version(version)
        manifest = Manifest(version=version, location=str(path), tensors=write_raw(path, tensors))
        for old in self._held()[:-KEPT]:
            self.retire(old)
        return manifest

    def retire(self, version: int) -> None:
        self._version(version).unlink(missing_ok=True)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _version(self, version: int) -> Path:
        return self.folder / f"version-{version}"

    def _held(self) -> list[int]:
        """Versions that exist, ascending."""
        return sorted(int(p.name.removeprefix("version-")) for p in self.folder.iterdir())


@attrs.frozen
class SharedMemoryReceiver:
    """Engine side."""

    def fetch(self, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
        return read_tensors(Path(manifest.location), manifest.tensors, what=f"weights of version {manifest.version}")

    def close(self) -> None:
        """Nothing is held: each tensor keeps the map it lies in."""


def send(config: SharedMemoryConfig, run_dir: Path) -> SharedMemorySender:
    return SharedMemorySender(_folder(run_dir))


def receive(config: SharedMemoryConfig, run_dir: Path) -> SharedMemoryReceiver:
    return SharedMemoryReceiver()


def _folder(run_dir: Path) -> Path:
    """A folder in memory that belongs to this run of this user."""
    memory = Path("/dev/shm")
    parent = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    return parent / f"prl-{hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]}"
