"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves convention: dimension i turns with i + D/2."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from prl.blocks.context import Context


@attrs.frozen
class Tables:
    """What `rotate` multiplies with, for the tokens of one forward pass."""

    cos: Tensor  # [T, 1, D]
    sin: Tensor  # [T, 1, D], negated in the first half


@attrs.frozen
class RotaryEmbedding:
    """One set of frequencies; layers that share it share its tables through the context."""

    head_dim: int
    theta: float
    _known: dict[Any, Tensor] = attrs.field(factory=dict, init=False, eq=False, repr=False)
    """(device, dtype) -> [N, 2, D] tables of the first N positions: decoding looks up, it does not compute."""

    def tables(self, context: Context, dtype: torch.dtype) -> Tables:
        """For the context's tokens. Angles are computed in float32."""
        key = (self, dtype)
        if key not in context.memo:
            positions = context.positions
            rows = self._first(context.longest, positions.device, dtype).index_select(0, positions)
            context.memo[key] = Tables(rows[:, :1], rows[:, 1:])
        tables: Tables = context.memo[key]
        return tables

    def _first(self, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[>= count, 2, D]; grows by doubling."""
        key = (device, dtype)
        if key not in self._known or len(self._known[key]) < count:
            positions = torch.arange(max(256, 2 ** (count - 1).bit_length()), device=device, dtype=torch.float32)
            exponents = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
            angles = positions[:, None] * (1.0 / self.theta**exponents)
            cos, sin = angles.cos(), angles.sin()
            rows = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1)
            self._known[key] = rows.to(dtype)
        return self._known[key]


def rotate(x: Tensor, tables: Tables) -> Tensor:
    """x [T, H, D] -> the same shape, every head turned by its token's angles."""
    return torch.addcmul(x * tables.cos, x.roll(x.shape[-1] // 2, -1), tables.sin)
