"""Columns too large for a message: they rest in files of the run directory, and messages carry references to them.

    environment worker   write    <run>/columns/<group>.<attempt>.<digest of the bytes>
    controller           forwards references without looking behind them; sweeps files (`prl.dispatch.sweep`)
    trainer rank         read     the columns of its own samples: mapped into memory, verified

Meant for what grows with tokens x layers: the experts a 131k-token rollout was routed to are 80 MB, and 256 such
rollouts would be 20 GB through the controller's event loop. Every host of the run must see the run directory.
`Rollout.large`, `Sample.large` and `MicroBatch.large` carry the references from end to end. What an attempt writes
twice is stored once: siblings share the file of their prompt.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import shutil
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from prl.errors import InfrastructureError
from prl.types import ColumnReference, Group

_DTYPES = {name: np.dtype(name) for name in ("bool", "uint8", "uint16", "int32", "int64", "float32")}
_ALIGNMENT = 64


@attrs.frozen
class ColumnFolder:
    """The large columns of a run (`RunDir.columns`); every call blocks on the disk.

    Example:
        >>> folder = ColumnFolder(run_dir.columns)
        >>> large = folder.write({"routes": routes}, group_id=7, attempt=0)
        >>> folder.read(large["routes"]).shape
        (131072, 75, 8)
    """

    path: Path

    def write(self, columns: Mapping[str, NDArray[Any]], *, group_id: int, attempt: int) -> dict[str, ColumnReference]:
        """Write columns into one file, named by what is in it; where the attempt has that file it is left alone."""
        contents = {name: _content(column) for name, column in columns.items()}
        path = self.path / f"{group_id}.{attempt}.{_digest(contents.values())}"
        references, end = {}, 0
        for name, column in columns.items():
            offset = end + -end % _ALIGNMENT
            end = offset + len(contents[name])
            references[name] = ColumnReference(
                file=path.name,
                dtype=str(column.dtype),
                shape=column.shape,
                offset=offset,
                checksum=zlib.crc32(contents[name]),
            )
        if not path.exists():
            self._write(path, [(references[name].offset, content) for name, content in contents.items()])
        return references

    def _write(self, path: Path, parts: Sequence[tuple[int, memoryview]]) -> None:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = self.path / f"{path.name}.{os.getpid()}.partial"
        try:
            with partial.open("wb") as file:
                for offset, content in parts:
                    file.write(b"\0" * (offset - file.tell()))
                    file.write(content)
            partial.replace(path)
        except OSError as error:
            raise InfrastructureError(f"column {path.name} cannot be written: {error}") from error
        finally:
            partial.unlink(missing_ok=True)

    def read(self, reference: ColumnReference) -> NDArray[Any]:
        """The column, read-only; InfrastructureError when it is gone, cut short or not what was written."""
        dtype, nbytes = _layout(reference)
        try:
            with (self.path / reference.file).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")
        except OSError as error:
            raise InfrastructureError(f"column {reference.file} cannot be read: {error}") from error
        end = reference.offset + nbytes
        if end > size:
            raise InfrastructureError(f"column {reference.file} ends at byte {end}, its file at byte {size}")
        column = content[reference.offset : end]
        seen = zlib.crc32(column)
        if seen != reference.checksum:
            raise InfrastructureError(
                f"column {reference.file} has checksum {seen:08x} where {reference.checksum:08x} was written"
            )
        return np.frombuffer(column, dtype=dtype).reshape(reference.shape)

    def files(self) -> list[str]:
        """Names of everything that lies here, unfinished files included."""
        return os.listdir(self.path) if self.path.is_dir() else []

    def remove(self, files: Sequence[str]) -> None:
        for file in files:
            (self.path / file).unlink(missing_ok=True)

    def lend(self, files: Iterable[str], folder: Path) -> None:
        """Have these files in another folder, too: as hard links, or copies where it lies on another file system.

        Nobody writes into a column that is complete, so two names of one file are as good as two files.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in files:
            (folder / file).unlink(missing_ok=True)
            try:
                os.link(self.path / file, folder / file)
            except OSError:
                shutil.copyfile(self.path / file, folder / file)

    def clear(self) -> None:
        """Remove everything: what the end of a run leaves behind belongs to attempts that nobody waits for."""
        shutil.rmtree(self.path, ignore_errors=True)


def named_by(groups: Iterable[Group]) -> set[str]:
    """The files that hold the large columns of these groups."""
    columns = (pieces for group in groups for rollout in group.rollouts for pieces in rollout.large.values())
    return {piece.file for pieces in columns for piece in pieces}


def abandoned(files: Sequence[str], alive: Collection[tuple[int, int]]) -> list[str]:
    """Those of `files` that belong to no (group, attempt) of `alive`.

    `alive` must be read after `files` were listed: an attempt that began in between has no file among them yet.
    """
    return [file for file in files if tuple(map(int, file.split(".")[:2])) not in alive]


def _content(column: NDArray[Any]) -> memoryview:
    if str(column.dtype) not in _DTYPES:
        raise TypeError(f"a large column of {column.dtype}; possible are {', '.join(_DTYPES)}")
    return np.ascontiguousarray(column).reshape(-1).view(np.uint8).data


def _digest(contents: Iterable[memoryview]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for content in contents:
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _layout(reference: ColumnReference) -> tuple[np.dtype[Any], int]:
    """dtype and number of bytes; a reference comes from a wire, so nothing about it is taken for granted."""
    dtype = _DTYPES.get(reference.dtype)
    inside = Path(reference.file).name == reference.file  # a bare name, not a way out of the folder
    if dtype is None or not inside or min((reference.offset, *reference.shape)) < 0:
        raise InfrastructureError(f"a reference to a column contradicts itself: {reference}")
    return dtype, math.prod(reference.shape) * dtype.itemsize
