"""Hugging Face checkpoints: a folder of safetensors files, an index when there are several, and config.json.

`load` is called by the trainer for `trainer.initial_weights`, `save` by whoever hands weights to the world. Which
tensors there are and what they are called is the affair of the model's weight map.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from prl.blocks.sharded import local, part_of
from prl.blocks.weight_map import stacked_views
from prl.errors import CheckpointError
from prl.providers import WeightMap

INDEX = "model.safetensors.index.json"
_SHOWN = 8
"""Names an error lists before it only counts."""


# --- reading ----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def load(model: nn.Module, weight_map: WeightMap, folder: Path) -> None:
    """Fill every tensor of `model` from `folder`, cast to its dtype; what was read for one is freed before the next.

    The model may be divided over ranks: each fills its own part.

    CheckpointError lists the tensors that are missing, of the wrong shape or not the model's. Tensors that the weight
    map only carries are left alone.
    """
    stored = _StoredTensors(folder)
    tensors = model.state_dict()
    expected = _expected_shapes(tensors, weight_map)
    missing = sorted(expected.keys() - stored.keys())
    misshapen = [
        f"{name} is {list(stored.shape(name))}, the model's is {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored.shape(name) != shape
    ]
    if missing or misshapen:
        _refuse(
            folder,
            missing=missing,
            misshapen=misshapen,
            unexpected=_not_carried(stored.keys() - expected.keys(), weight_map),
        )
    for name, tensor in tensors.items():
        try:
            _fill(tensor, name, stored, weight_map)
        except ValueError as error:
            raise CheckpointError(f"the weights in {folder} contradict each other: {error}") from error
    _refuse(folder, unexpected=_not_carried(stored.keys() - expected.keys() - stored.read, weight_map))


def _fill(tensor: Tensor, name: str, stored: Mapping[str, Tensor], weight_map: WeightMap) -> None:
    """Of a stack that is divided over ranks only the matrices this rank has a part of are read."""
    if not isinstance(tensor, DTensor):
        tensor.copy_(weight_map.from_hf(stored, name))
        return
    part, own = part_of(tensor, rank=0), local(tensor)
    views = stacked_views(weight_map, name, tensor.shape)
    if views is None:
        own.copy_(weight_map.from_hf(stored, name)[part.slices])
        return
    matrices, rows, columns = part.slices
    for view in views:
        if matrices.start <= view.index < matrices.stop:
            start, stop = max(view.start, rows.start), min(view.start + view.rows, rows.stop)
            if start < stop:
                piece = stored[view.name][start - view.start : stop - view.start, columns]
                own[view.index - matrices.start, start - rows.start : stop - rows.start].copy_(piece)


def _not_carried(names: Set[str], weight_map: WeightMap) -> list[str]:
    return sorted(name for name in names if not name.startswith(tuple(weight_map.carried)))


def _expected_shapes(tensors: Mapping[str, Tensor], weight_map: WeightMap) -> dict[str, tuple[int, ...]]:
    """Shape of every checkpoint tensor the model is stored as."""
    return {
        hf_name: tuple(view.shape)
        for name, tensor in tensors.items()
        for hf_name, view in weight_map.to_hf(name, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
    }


def _refuse(folder: Path, **problems: list[str]) -> None:
    found = [f"{kind}: {_listed(names)}" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(
            f"the weights in {folder} are not this model's; {'; '.join(found)}. Check that the sizes in [model] are "
            "those of the checkpoint (model.checkpoint reads them from its config.json)"
        )


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


class _StoredTensors(Mapping[str, Tensor]):
    """The tensors of a folder, each read from disk when asked for; `read` are the names that were."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file_of = _files_of_tensors(folder)
        self._open: dict[str, Any] = {}
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        file = self._file(name)
        self.read.add(name)
        with self._explained(name):
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Read from the file's header."""
        with self._explained(name):
            return tuple(self._file(name).get_slice(name).get_shape())

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
        try:
            return dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index} is not an index of safetensors files: {error}") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no *.safetensors file; weights are read from a Hugging Face folder")
    return {name: file.name for file in files for name in _open(file).keys()}  # noqa: SIM118 (not a mapping)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


# --- writing ----------------------------------------------------------------------------------------------------------
def save(
    tensors: Iterable[tuple[str, Tensor]],
    weight_map: WeightMap,
    folder: Path,
    *,
    origin: Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write module tensors (name, tensor) as a checkpoint that transformers and vLLM load: `save_stored`."""
    stored = _stored_form(tensors, weight_map)
    save_stored(stored, weight_map, folder, origin=origin, max_shard_bytes=max_shard_bytes)


def save_stored(
    tensors: Iterable[tuple[str, Tensor]],
    weight_map: WeightMap,
    folder: Path,
    *,
    origin: Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write tensors under their checkpoint names.

    `origin` is the checkpoint the model came from: the tensors the weight map carries are copied from it. At most
    `max_shard_bytes` (or one tensor, if larger) are in memory at a time. CheckpointError when `folder` already
    holds weights: two checkpoints in one folder would be read as one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / INDEX).exists() or next(folder.glob("*.safetensors"), None):
        raise CheckpointError(f"{folder} already holds weights; save to another folder, or remove them first")
    shards: list[list[str]] = []
    total = 0
    dtype = ""
    carried = iter(()) if origin is None else _carried(origin, weight_map)
    for shard in _shards(chain(tensors, carried), max_shard_bytes):
        save_file(shard, _unfinished(folder, len(shards)), metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
        dtype = dtype or str(next(iter(shard.values())).dtype).removeprefix("torch.")
    _name_shards(folder, shards, total)
    _write_config(folder, weight_map, dtype)


def save_share(
    share: Mapping[str, Tensor],
    weight_map: WeightMap,
    folder: Path,
    *,
    rank: int,
    owners: Mapping[str, int],
    origin: Path | None = None,
) -> None:
    """Write what one of several ranks has of a checkpoint, as one file; rank 0 also the index and config.json.

    `owners`: every tensor's checkpoint name -> the rank that writes it. The checkpoint is whole when all have written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks = max(owners.values()) + 1
    carried = {} if origin is None else dict(_carried(origin, weight_map))
    tensors = {name: tensor.contiguous() for name, tensor in share.items()} | carried
    file = "model-{:05}-of-{:05}.safetensors"
    if tensors:
        save_file(tensors, folder / file.format(rank + 1, ranks), metadata={"format": "pt"})
    if rank == 0:
        places = dict.fromkeys(carried, 0) | dict(owners)
        index = {"metadata": {}, "weight_map": {name: file.format(r + 1, ranks) for name, r in places.items()}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        _write_config(folder, weight_map, str(next(iter(share.values())).dtype).removeprefix("torch."))


def _write_config(folder: Path, weight_map: WeightMap, dtype: str) -> None:
    config = {**weight_map.hf_config(), "dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _stored_form(tensors: Iterable[tuple[str, Tensor]], weight_map: WeightMap) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        for hf_name, view in weight_map.to_hf(name, tensor.detach()):
            yield hf_name, view.cpu().contiguous()


def _carried(origin: Path, weight_map: WeightMap) -> Iterator[tuple[str, Tensor]]:
    stored = _StoredTensors(origin)
    yield from ((name, stored[name]) for name in stored if name.startswith(tuple(weight_map.carried)))


def _shards(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def _unfinished(folder: Path, number: int) -> Path:
    return folder / f"unfinished-{number:05}"


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    """Files get their names when it is known how many there are; the index comes last, so it never names a part."""
    if len(shards) == 1:
        _unfinished(folder, 0).rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        _unfinished(folder, number).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
