"""Hugging Face checkpoints of models: a folder of safetensors files and config.json, in any number format.

`load` is called by the trainer for `trainer.initial_weights`, `save` by whoever hands weights to the world. Which
tensors there are and what they are called is the affair of the model's weight map, how they are encoded that of the
number format. Neither holds more than one module tensor and what it is stored as.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prl.blocks.form import Form, declaration_of
from prl.blocks.sharded import is_divided, local, part_of
from prl.blocks.tensor_folder import INDEX, MAX_SHARD_BYTES, StoredTensors, check_empty, write, write_share
from prl.blocks.weight_map import stacked_views
from prl.errors import CheckpointError
from prl.providers import NumberFormat, WeightMap

__all__ = ["INDEX", "load", "read_config", "restored", "save", "save_share"]
_SHOWN = 8
"""Names an error lists before it only counts."""


# --- reading ----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def load(model: nn.Module, weight_map: WeightMap, folder: Path, *, number_format: NumberFormat | None = None) -> None:
    """Fill every tensor of `model` from `folder`, cast to its dtype; what was read for one is freed before the next.

    `number_format` decodes what is quantised. The model may be divided over ranks: each fills its own part.
    CheckpointError lists the tensors that are missing, of the wrong shape or not the model's. Tensors that the weight
    map only carries are left alone.
    """
    header, stored = restored(folder, number_format)
    tensors = model.state_dict()
    expected = _expected_shapes(tensors, weight_map)
    missing = sorted(expected.keys() - header.keys())
    misshapen = [
        f"{name} is {list(header[name].shape)}, the model's is {list(shape)}"
        for name, shape in expected.items()
        if name in header and header[name].shape != shape
    ]
    if missing or misshapen:
        _refuse(
            folder,
            missing=missing,
            misshapen=misshapen,
            unexpected=_not_carried(header.keys() - expected.keys(), weight_map),
        )
    reading = _Noted(stored)
    for name, tensor in tensors.items():
        try:
            _fill(tensor, name, reading, weight_map)
        except ValueError as error:
            raise CheckpointError(f"the weights in {folder} contradict each other: {error}") from error
    _refuse(folder, unexpected=_not_carried(header.keys() - expected.keys() - reading.names, weight_map))


def _fill(tensor: Tensor, name: str, stored: Mapping[str, Tensor], weight_map: WeightMap) -> None:
    """Of a stack that is divided over ranks only the matrices this rank has a part of are read."""
    if not is_divided(tensor):
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


def restored(
    folder: Path, number_format: NumberFormat | None = None
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The tensors of a folder by Hugging Face name, decoded: as meta tensors, and read when asked for."""
    stored = StoredTensors(folder)
    declared = declaration_of(read_config(folder))
    if number_format is None and declared is None:
        return stored.header(), stored
    if number_format is None or not number_format.reads(declared):
        raise CheckpointError(
            f"the weights in {folder} are quantised (config.json: quantization_config = {_summary(declared)}), which "
            "the number format of this run does not read: set quantization.type to the one that does (fp8_block, "
            "int4_group, ...), or convert the weights with `prl weights convert`"
        )
    header = number_format.restore(stored.header())
    return {name: header[name] for name in header}, number_format.restore(stored)


def read_config(folder: Path) -> Mapping[str, Any]:
    """`config.json` of a folder, empty where there is none."""
    file = folder / "config.json"
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds {type(config).__name__}, where a config is an object")
    return config


def _summary(declared: Mapping[str, Any] | None) -> str:
    text = json.dumps(declared)
    return text if len(text) < 200 else text[:200] + "..."


class _Noted(Mapping[str, Tensor]):
    """Tensors, and the names of those that were read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        self.names.add(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


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


# --- writing ----------------------------------------------------------------------------------------------------------
def save(
    tensors: Iterable[tuple[str, Tensor]],
    weight_map: WeightMap,
    folder: Path,
    *,
    form: Form | None = None,
    origin: Path | None = None,
    origin_format: NumberFormat | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write module tensors (name, tensor) as a checkpoint that transformers and vLLM load.

    In the form given, or with the dtypes they have. `origin` is the checkpoint the model came from, written in
    `origin_format`: the tensors the weight map carries are copied from it, bit for bit where the form is the same. Only
    one module tensor is encoded at a time.
    """
    check_empty(folder)
    held = dict(tensors)
    carried = _Carried(origin, origin_format, weight_map, form)
    planned = [*_stored_form(_as_meta(held.items()), weight_map, form), *carried.planned()]
    write(
        folder,
        planned,
        chain(_stored_form(held.items(), weight_map, form), carried.tensors()),
        max_shard_bytes=max_shard_bytes,
    )
    _write_config(folder, weight_map, planned, form)


def save_share(
    share: Mapping[str, Tensor],
    weight_map: WeightMap,
    folder: Path,
    *,
    rank: int,
    owners: Mapping[str, int],
    origin: Path | None = None,
    origin_format: NumberFormat | None = None,
) -> None:
    """Write what one of several ranks has of a checkpoint, under its checkpoint names and with the dtypes it has.

    `owners`: every tensor's name -> the rank that writes it; empty for a single rank. Rank 0 also copies what the
    weight map carries from `origin`, and writes config.json. The checkpoint is whole when all ranks have written.
    """
    carried = _Carried(origin if rank == 0 else None, origin_format, weight_map, None)
    planned = [*_as_meta(share.items()), *carried.planned()]
    tensors = chain(share.items(), carried.tensors())
    if owners:
        write_share(folder, planned, tensors, rank=rank, owners=owners)
    else:
        check_empty(folder)
        write(folder, planned, tensors, max_shard_bytes=MAX_SHARD_BYTES)
    if rank == 0:
        _write_config(folder, weight_map, planned, None)


def _write_config(
    folder: Path, weight_map: WeightMap, planned: Sequence[tuple[str, Tensor]], form: Form | None
) -> None:
    if form is None:
        dtype = str(planned[0][1].dtype).removeprefix("torch.") if planned else "float32"
        config = {**weight_map.hf_config(), "dtype": dtype}
    else:
        config = dict(form.declared(weight_map.hf_config(), planned))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _as_meta(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, torch.empty(t.shape, dtype=t.dtype, device="meta")) for name, t in tensors)


def _stored_form(
    tensors: Iterable[tuple[str, Tensor]], weight_map: WeightMap, form: Form | None
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        for hf_name, view in weight_map.to_hf(name, tensor.detach()):
            yield from [(hf_name, view)] if form is None else form.apply(hf_name, view)


class _Carried:
    """Tensors of the checkpoint a model came from that it has no part for."""

    def __init__(
        self, origin: Path | None, number_format: NumberFormat | None, weight_map: WeightMap, form: Form | None
    ) -> None:
        self._header: Mapping[str, Tensor] = {}
        self._stored: Mapping[str, Tensor] = {}
        self._names: Sequence[str] = ()
        self._form = form
        if origin is None or not weight_map.carried:
            return
        declared = declaration_of(read_config(origin))
        if form is not None and declared is not None and form.number_format.reads(declared):
            self._stored = StoredTensors(origin)
            self._header, self._form = self._stored.header(), None
        else:
            self._header, self._stored = restored(origin, number_format)
        self._names = [name for name in self._header if name.startswith(tuple(weight_map.carried))]

    def planned(self) -> Iterator[tuple[str, Tensor]]:
        return self._formed(self._header)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return self._formed(self._stored)

    def _formed(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name in self._names:
            yield from [(name, tensors[name])] if self._form is None else self._form.apply(name, tensors[name])
