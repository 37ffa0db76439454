"""What every mixer may know about the packed tokens it is given.

One layout for training and serving: `T` tokens of `S` sequences one after the other. Training has no caches and every
sequence starts at position 0. Serving gives each sequence a cache row in which `past` tokens already lie; a decoding step
is the case of one new token per sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor


@attrs.define(kw_only=True)
class Context:
    """Built once per forward pass and shared by all layers.

    Example:
        >>> Context.packed(torch.tensor([0, 2, 5])).positions
        tensor([0, 1, 0, 1, 2])
    """

    lengths: tuple[int, ...]
    """[S] new tokens of each sequence; their sum is T."""
    positions: Tensor
    """[T] int64, position of each token in its own sequence."""
    caches: Sequence[Any] | None = None
    """One per layer, from the model's `new_caches`; None when training."""
    rows: Tensor | slice | None = None
    """[S] int64 cache row of each sequence, or the slice of rows when they are consecutive (no gather is needed)."""
    past: Tensor | None = None
    """[S] int64 tokens already in each row."""
    past_max: int = 0
    """Largest of `past`, known on the host."""
    memo: dict[str, Any] = attrs.field(factory=dict)
    """What a layer computed that the next layers can share: rope tables, masks."""

    @classmethod
    def packed(cls, cu_seqlens: Tensor) -> Context:
        """For training: cu_seqlens [S + 1] int, host side; positions are built on the current default device."""
        bounds = cu_seqlens.tolist()
        lengths = tuple(b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True))
        starts = torch.repeat_interleave(torch.tensor(bounds[:-1]), torch.tensor(lengths))
        return cls(lengths=lengths, positions=torch.arange(bounds[-1]) - starts)

    @classmethod
    def cached(
        cls, caches: Sequence[Any], *, lengths: Sequence[int], rows: Tensor | slice, past: Sequence[int]
    ) -> Context:
        """For serving: `lengths[s]` new tokens continue the `past[s]` tokens that lie in cache row `rows[s]`."""
        positions = torch.cat([torch.arange(p, p + n) for p, n in zip(past, lengths, strict=True)])
        return cls(
            lengths=tuple(lengths),
            positions=positions,
            caches=caches,
            rows=rows,
            past=torch.tensor(past),
            past_max=max(past, default=0),
        )

    @property
    def decoding(self) -> bool:
        """Every sequence has exactly one new token."""
        return self.caches is not None and len(self.lengths) == len(self.positions)
