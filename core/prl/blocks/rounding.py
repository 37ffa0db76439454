"""Fake quantization: the forward pass sees weights as engines will, the backward pass does not notice.

`install` gives each module the roundings of its own parameters; `Rounds.as_served` is where a module reads them. The
gradient goes straight through to the unrounded weight (Bengio et al. 2013, arXiv:1308.3432). Called by
`prl.train.worker`; which matrices there are, and the published shapes they are rounded in, is told by the weight map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.autograd import Function

from prl.blocks.form import matches
from prl.blocks.sharded import local
from prl.providers import NumberFormat, WeightMap


@attrs.frozen(kw_only=True)
class Rounding:
    """How one parameter [..., O, I] is rounded: `rows` of its published matrices in turn, and which of them are."""

    number_format: NumberFormat
    rows: Sequence[int]
    chosen: Sequence[bool]

    def __call__(self, weight: Tensor) -> Tensor:
        """The values engines compute with, in the weight's dtype; differentiable."""
        rounded: Tensor = _StraightThrough.apply(weight, self)  # type: ignore[no-untyped-call]
        return rounded

    def values(self, weight: Tensor) -> Tensor:
        """The same without a gradient."""
        parts = zip(torch.split(weight, list(self.rows), -2), self.chosen, strict=True)
        return torch.cat([self._values(part) if chosen else part for part, chosen in parts], -2)

    def _values(self, matrices: Tensor) -> Tensor:
        return self.number_format.rounded(matrices).to(self.number_format.serve_dtype).to(matrices.dtype)


class Rounds(nn.Module):
    """A module some of whose parameters may be rounded where it uses them."""

    roundings: Mapping[str, Rounding] = MappingProxyType({})

    def as_served(self, name: str) -> Tensor:
        """This rank's part of the parameter `name`, rounded where `install` said so."""
        weight = local(getattr(self, name))
        rounding = self.roundings.get(name)
        return weight if rounding is None else rounding(weight)


def install(
    model: nn.Module, weight_map: WeightMap, number_format: NumberFormat, *, unquantized: Sequence[str] = ()
) -> list[str]:
    """Round what `number_format` quantises in `model`'s forward passes from now on; the names of those parameters."""
    rounded = []
    for name, module in model.named_modules():
        if isinstance(module, Rounds):
            found = dict(_roundings(name, module, weight_map, number_format, unquantized))
            module.roundings = found
            rounded += [f"{name}.{parameter}" for parameter in found]
    return rounded


def _roundings(
    path: str, module: nn.Module, weight_map: WeightMap, number_format: NumberFormat, unquantized: Sequence[str]
) -> Iterator[tuple[str, Rounding]]:
    for name, parameter in module.named_parameters(recurse=False):
        rows: list[int] = []
        chosen: list[bool] = []
        for published, view in weight_map.to_hf(f"{path}.{name}", parameter.detach().to("meta")):
            if parameter.dim() < 2 or sum(rows) == parameter.shape[-2]:
                break  # experts are stacked: the next one has the parts of the first
            rows.append(view.shape[0])
            chosen.append(not matches(unquantized, published) and number_format.quantizes(published, view.shape))
        if any(chosen):
            yield name, Rounding(number_format=number_format, rows=rows, chosen=chosen)


class _StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounding: Rounding) -> Tensor:
        return rounding.values(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
