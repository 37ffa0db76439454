"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves convention: dimension i turns with i + D/2."""

from __future__ import annotations

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

    def tables(self, context: Context, dtype: torch.dtype) -> Tables:
        """Angles are computed in float32, once per forward pass."""
        key = (self, dtype)
        if key not in context.memo:
            context.memo[key] = self._tables(context.positions, dtype)
        tables: Tables = context.memo[key]
        return tables

    def _tables(self, positions: Tensor, dtype: torch.dtype) -> Tables:
        exponents = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32) / self.head_dim
        angles = positions.float()[:, None, None] * (1.0 / self.theta**exponents)
        cos, sin = angles.cos(), angles.sin()
        return Tables(torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype))


def rotate(x: Tensor, tables: Tables) -> Tensor:
    """x [T, H, D] -> the same shape, every head turned by its token's angles."""
    return torch.addcmul(x * tables.cos, x.roll(x.shape[-1] // 2, -1), tables.sin)
