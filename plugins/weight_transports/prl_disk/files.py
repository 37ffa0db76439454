"""`<run>/weights/version-<n>/model-<rank>.safetensors`: written once, read in place, removed when retired.

The files are ordinary safetensors under Hugging Face names, so that other tools can load a version too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import attrs
from prl.types import Manifest
from prl.weights.tensors import inside, read_tensors, write_atomically, write_safetensors
from torch import Tensor

from prl_disk import DiskConfig


@attrs.frozen
class DiskSender:
    """Trainer side."""

    folder: Path
    rank: int = 0

    def send(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> Manifest:
        """Write this rank's part of a version; one written before is replaced."""
        path = self._path(version)
        path.parent.mkdir(parents=True, exist_ok=True)
        records = write_atomically(path, write_safetensors, tensors)
        return Manifest.single(version=version, location=str(path), tensors=records)

    def retire(self, version: int) -> None:
        self._path(version).unlink(missing_ok=True)
        with suppress(OSError):  # other ranks have not retired their parts yet, or have done so
            self._path(version).parent.rmdir()

    def close(self) -> None:
        """Versions stay: the last one is the result of the run."""

    def _path(self, version: int) -> Path:
        return self.folder / f"version-{version}" / f"model-{self.rank:05}.safetensors"


@attrs.frozen
class DiskReceiver:
    """Engine side."""

    folder: Path

    def fetch(self, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
        what = f"weights of version {manifest.version}"
        for part in manifest.parts:
            yield from read_tensors(inside(self.folder, part.location, what=what), part.tensors, what=what)

    def close(self) -> None:
        """Nothing is held: each tensor keeps the map it lies in."""


def send(config: DiskConfig, run_dir: Path, rank: int) -> DiskSender:
    return DiskSender(run_dir / "weights", rank)


def receive(config: DiskConfig, run_dir: Path) -> DiskReceiver:
    return DiskReceiver(run_dir / "weights")
