"""`<run>/weights/version-<n>/model.safetensors`: written once, read in place, removed when retired.

The files are ordinary safetensors under Hugging Face names, so that other tools can load a version too.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
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

    def send(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> Manifest:
        """Write a version; a version written before is replaced."""
        path = self._version(version) / "model.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        records = write_atomically(path, write_safetensors, tensors)
        return Manifest(version=version, location=str(path), tensors=records)

    def retire(self, version: int) -> None:
        shutil.rmtree(self._version(version), ignore_errors=True)

    def close(self) -> None:
        """Versions stay: the last one is the result of the run."""

    def _version(self, version: int) -> Path:
        return self.folder / f"version-{version}"


@attrs.frozen
class DiskReceiver:
    """Engine side."""

    folder: Path

    def fetch(self, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
        what = f"weights of version {manifest.version}"
        return read_tensors(inside(self.folder, manifest.location, what=what), manifest.tensors, what=what)

    def close(self) -> None:
        """Nothing is held: each tensor keeps the map it lies in."""


def send(config: DiskConfig, run_dir: Path) -> DiskSender:
    return DiskSender(run_dir / "weights")


def receive(config: DiskConfig, run_dir: Path) -> DiskReceiver:
    return DiskReceiver(run_dir / "weights")
