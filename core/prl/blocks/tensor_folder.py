"""A folder of safetensors files, with an index when there are several: one tensor in memory at a time, both ways.

`StoredTensors` reads a tensor from disk when it is asked for. `write` is told names, types and shapes before it gets
the tensors, so it writes a file's header first and every tensor to its place as it comes. Knows nothing of models; used
by `prl.blocks.checkpoint` and `prl.blocks.conversion`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prl.errors import CheckpointError
from prl.weights.tensors import SAFETENSORS_DTYPES, safetensors_header, tensor_bytes

INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}

Named: TypeAlias = tuple[str, Tensor]


# --- reading ----------------------------------------------------------------------------------------------------------
class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a folder, each read from disk when asked for; CheckpointError names what is damaged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file_of = _files_of_tensors(folder)
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        file = self._file(name)
        with self._explained(name):
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def header(self) -> Mapping[str, Tensor]:
        """Every tensor as a meta tensor: its type and shape, read from the headers."""
        return {name: self._described(name) for name in self}

    def file_of(self, name: str) -> str:
        return self._file_of[name]

    def _described(self, name: str) -> Tensor:
        with self._explained(name):
            view = self._file(name).get_slice(name)
            shape, dtype = view.get_shape(), str(view.get_dtype())
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"{self._folder / self._file_of[name]}: {name} is {dtype}; only {', '.join(_DTYPES)} can be read"
            )
        return torch.empty(shape, dtype=_DTYPES[dtype], device="meta")

    def _file(self, name: str) -> Any:
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = _open(self._folder / file)
        return self._open[file]

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except SafetensorError as error:
            raise CheckpointError(f"{self._folder / self._file_of[name]} is damaged: {name}: {error}") from error

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _files_of_tensors(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index or, where there is none, from the files themselves."""
    index = folder / INDEX
    if index.exists():
        return _indexed(index)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no *.safetensors file; weights are read from a Hugging Face folder")
    return {name: file.name for file in files for name in _open(file).keys()}  # noqa: SIM118 (not a mapping)


def _indexed(index: Path) -> dict[str, str]:
    try:
        files = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors files: {error}") from error
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index} says that {name} is in {file!r}, which is no name of a file beside it")
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


# --- writing ----------------------------------------------------------------------------------------------------------
def check_empty(folder: Path) -> None:
    """Make `folder`; CheckpointError when it already holds weights: two checkpoints in one would be read as one."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / INDEX).exists() or next(folder.glob("*.safetensors"), None):
        raise CheckpointError(f"{folder} already holds weights; save to another folder, or remove them first")


def write(folder: Path, planned: Sequence[Named], tensors: Iterable[Named], *, max_shard_bytes: int) -> None:
    """Write `tensors`, which come in the order and with the types and shapes of `planned` (any device, e.g. meta).

    A file takes at most `max_shard_bytes`, or one tensor. Files get their names at the end and the index comes last, so
    that nobody takes a part for a whole.
    """
    shards = list(_shards(planned, max_shard_bytes))
    stream = iter(tensors)
    for number, shard in enumerate(shards):
        _write_shard(_unfinished(folder, number), shard, islice(stream, len(shard)))
    _name_shards(folder, shards)


def write_share(
    folder: Path, planned: Sequence[Named], tensors: Iterable[Named], *, rank: int, owners: Mapping[str, int]
) -> None:
    """Write what one of several ranks has of a folder, as `write` does but into one file; rank 0 also the index.

    `owners`: name of every tensor -> the rank that writes it; what else rank 0 writes is its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks = max(owners.values()) + 1
    file = "model-{:05}-of-{:05}.safetensors"
    if planned:
        _write_shard(folder / file.format(rank + 1, ranks), planned, tensors)
    if rank == 0:
        places = {**dict.fromkeys((name for name, _ in planned), 0), **owners}
        index = {"metadata": {}, "weight_map": {name: file.format(r + 1, ranks) for name, r in places.items()}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(planned: Iterable[Named], max_bytes: int) -> Iterator[list[Named]]:
    shard: list[Named] = []
    size = 0
    for name, tensor in planned:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append((name, tensor))
        size += tensor.nbytes
    if shard:
        yield shard


def _write_shard(path: Path, planned: Sequence[Named], tensors: Iterable[Named]) -> None:
    ordered = sorted(planned, key=lambda item: -item[1].element_size())  # no gaps allowed, so wide elements go first
    header = safetensors_header(ordered, metadata={"format": "pt"})
    place, places = 8 + len(header), {}
    for name, tensor in ordered:
        places[name] = place
        place += tensor.nbytes
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for (name, expected), (given, tensor) in zip(planned, tensors, strict=True):
            if (name, expected.dtype, expected.shape) != (given, tensor.dtype, tensor.shape):
                raise CheckpointError(
                    f"{path.parent}: {name} was announced as {expected.dtype} {list(expected.shape)}, but {given} came "
                    f"as {tensor.dtype} {list(tensor.shape)}"
                )
            file.seek(places[name])
            file.write(tensor_bytes(tensor))


def _unfinished(folder: Path, number: int) -> Path:
    return folder / f"unfinished-{number:05}"


def _name_shards(folder: Path, shards: Sequence[Sequence[Named]]) -> None:
    if len(shards) == 1:
        _unfinished(folder, 0).rename(folder / "model.safetensors")
        return
    files: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        _unfinished(folder, number).rename(folder / file)
        files |= {name: file for name, _ in shard}
    total = sum(tensor.nbytes for shard in shards for _, tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
