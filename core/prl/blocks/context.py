"""What every mixer may know about the packed tokens it is given.

One layout for training and serving: `T` tokens of `S` sequences one after the other. Training has no caches and every
sequence starts at position 0. Serving gives each sequence a cache row in which `past` tokens already lie; a decoding
step is the case of one new token per sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import attrs
import torch
from torch import Tensor


@attrs.frozen(eq=False)
class SharedPrefixes:
    """Sequences that begin alike, where what they have in common is computed once: `U` rows for `T` tokens."""

    source: Tensor  # [T] int64, the row that computes each token
    kept: Tensor  # [U] int64, a token that each row computes

    def expand(self, x: Tensor) -> Tensor:
        """x [U, ...] -> [T, ...]"""
        return x.index_select(0, self.source)

    def collect(self, x: Tensor) -> Tensor:
        """x [T, ...], equal for tokens that a row computes together -> [U, ...]"""
        return x.index_select(0, self.kept)


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
    past_min: int = 0
    """Smallest of `past`, known on the host."""
    past_max: int = 0
    """Largest of `past`, known on the host."""
    longest: int = 0
    """Largest of `past + lengths`: how far attention looks into the caches. Known on the host."""
    decoding: bool = False
    """Every sequence has exactly one new token: `positions` equals `past`."""
    shared: SharedPrefixes | None = None
    """When training, and the model `shares_prefixes`: what it is given are `U` rows, and so is `positions`. Only what
    looks at other tokens of a sequence expands them to the `T` tokens that `lengths` count."""
    memo: dict[Any, Any] = attrs.field(factory=dict)
    """What a layer computed that the next layers can share: rope tables, masks."""

    @classmethod
    def packed(cls, cu_seqlens: Tensor, shared: SharedPrefixes | None = None) -> Context:
        """For training: cu_seqlens [S + 1] int, host side; positions are built on the current default device."""
        bounds = cu_seqlens.tolist()
        lengths = tuple(b - a for a, b in pairwise(bounds))
        positions = _positions(lengths, first=[0] * len(lengths))
        if shared is not None:
            positions = shared.collect(positions)
        return cls(lengths=lengths, positions=positions, longest=max(lengths, default=0), shared=shared)

    @classmethod
    def cached(
        cls, caches: Sequence[Any], *, lengths: Sequence[int], rows: Tensor | slice, past: Sequence[int]
    ) -> Context:
        """For serving: `lengths[s]` new tokens continue the `past[s]` tokens that lie in cache row `rows[s]`."""
        tokens_before = torch.tensor(past, dtype=torch.int64)
        decoding = len(lengths) > 0 and min(lengths) == max(lengths) == 1
        return cls(
            lengths=tuple(lengths),
            positions=tokens_before if decoding else _positions(lengths, first=past),
            caches=caches,
            rows=rows,
            past=tokens_before,
            past_min=min(past, default=0),
            past_max=max(past, default=0),
            longest=max((p + n for p, n in zip(past, lengths, strict=True)), default=0),
            decoding=decoding,
        )


def _positions(lengths: Sequence[int], *, first: Sequence[int]) -> Tensor:
    """[T] `first[s], first[s] + 1, ...` for each sequence, on the current default device."""
    starts, total = [], 0
    for n, position in zip(lengths, first, strict=True):
        starts.append(total - position)
        total += n
    offsets = torch.tensor(starts, dtype=torch.int64)
    return torch.arange(total) - offsets.repeat_interleave(torch.tensor(lengths, dtype=torch.int64), output_size=total)
