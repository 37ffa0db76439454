"""What is in a checkpoint, and what two of them do not share. Called by `prl weights`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from prl.blocks.checkpoint import read_config, restored
from prl.blocks.tensor_folder import StoredTensors
from prl.providers import NumberFormat

_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")


# --- one --------------------------------------------------------------------------------------------------------------
@attrs.frozen(kw_only=True)
class Kind:
    """Tensors that differ in the numbers of their names only."""

    names: str
    """E.g. `model.layers.{3-77}.mlp.gate.weight`."""
    dtype: str
    shape: tuple[int, ...]
    count: int


@attrs.frozen(kw_only=True)
class Parameters:
    """How many numbers a model has, however they are stored."""

    total: int
    active: int | None
    """Those that one token meets; None where config.json does not say how many experts it is sent to."""
    carried: Mapping[str, int]
    """Prefix -> numbers that are no part of the language model and not in `total`: vision, further tokens."""


def kinds(folder: Path, *, one_by_one: bool = False) -> list[Kind]:
    """Every stored tensor, those of like names together unless `one_by_one`."""
    found: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for name, tensor in StoredTensors(folder).header().items():
        pattern = name if one_by_one else re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)
        key = (pattern, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        found.setdefault(key, []).append(name)
    return [
        Kind(names=_ranges(pattern, names), dtype=dtype, shape=shape, count=len(names))
        for (pattern, dtype, shape), names in found.items()
    ]


def _ranges(pattern: str, names: Sequence[str]) -> str:
    numbers = [[int(part) for part in re.findall(r"(?<=\.)\d+(?=\.)", name)] for name in names]
    for column in zip(*numbers, strict=True) if "{}" in pattern else ():
        first, last = min(column), max(column)
        pattern = pattern.replace("{}", str(first) if first == last else f"{{{first}-{last}}}", 1)
    return pattern


def parameters(folder: Path, number_format: NumberFormat | None, carried: Sequence[str]) -> Parameters:
    """Counted from the headers; `carried` are prefixes of what is no part of the language model."""
    header, _ = restored(folder, number_format)
    apart = {prefix: _count(header, lambda name, p=prefix: name.startswith(p)) for prefix in carried}
    own = {name: tensor for name, tensor in header.items() if not name.startswith(tuple(carried))}
    total, routed = _count(own, lambda name: True), _count(own, lambda name: ".experts." in name)
    share = _share_of_experts(read_config(folder)) if routed else 1.0
    active = None if share is None else total - routed + round(routed * share)
    return Parameters(total=total, active=active, carried={prefix: n for prefix, n in apart.items() if n})


def _count(header: Mapping[str, Tensor], wanted: Any) -> int:
    return sum(math.prod(tensor.shape) for name, tensor in header.items() if wanted(name))


def _share_of_experts(config: Mapping[str, Any]) -> float | None:
    """Experts a token is sent to over experts of a layer."""
    for place in (config, config.get("text_config") or {}):
        for key in _EXPERTS:
            if isinstance(place.get(key), int) and isinstance(place.get("num_experts_per_tok"), int):
                return float(place["num_experts_per_tok"]) / float(place[key])
    return None


# --- two --------------------------------------------------------------------------------------------------------------
@attrs.frozen(kw_only=True)
class Difference:
    """A tensor of two checkpoints that is not the same in both."""

    name: str
    largest: float | None
    """Largest absolute difference, in float32; None where shapes differ. NaN where one has a NaN."""
    note: str = ""


@attrs.frozen(kw_only=True)
class Comparison:
    compared: int
    different: Sequence[Difference]
    """Largest first."""
    only_first: Sequence[str]
    only_second: Sequence[str]

    @property
    def same(self) -> bool:
        return not (self.different or self.only_first or self.only_second)


def compare(
    first: Path, second: Path, *, formats: tuple[NumberFormat | None, NumberFormat | None] = (None, None)
) -> Comparison:
    """Two checkpoints by Hugging Face name, each decoded by its format; one tensor of each in memory at a time."""
    (header_a, a), (header_b, b) = (restored(folder, f) for folder, f in zip((first, second), formats, strict=True))
    shared = [name for name in header_a if name in header_b]
    different = [found for name in shared for found in _differences(name, a, b, header_a[name], header_b[name])]
    return Comparison(
        compared=len(shared),
        different=sorted(different, key=_size, reverse=True),
        only_first=sorted(header_a.keys() - header_b.keys()),
        only_second=sorted(header_b.keys() - header_a.keys()),
    )


def _differences(
    name: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor], shape_a: Tensor, shape_b: Tensor
) -> Iterator[Difference]:
    if shape_a.shape != shape_b.shape:
        note = f"shape {list(shape_a.shape)} and {list(shape_b.shape)}"
        yield Difference(name=name, largest=None, note=note)
        return
    x, y = a[name], b[name]
    if torch.equal(x, y):
        return
    largest = float((x.float() - y.float()).abs().max())
    if largest != 0:
        yield Difference(name=name, largest=largest)


def _size(difference: Difference) -> float:
    """What is no number comes first."""
    largest = difference.largest
    return math.inf if largest is None or math.isnan(largest) else largest
