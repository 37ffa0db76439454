"""What every mixer may know about the packed tokens it is given.

One layout for training and serving: `T` tokens of `S` sequences one after the other. Training has no caches and every
sequence starts at position 0. Serving gives each sequence a cache row in which `past` tokens already lie; a decoding
step is the case of one new token per sequence.

Ranks that share long sequences (context parallelism) hold equal shares of the packed tokens, one after the other. A
rank's context then speaks of its own share; of all mixers only those that look at other tokens notice, and ask
`with_earlier` for what lies on the ranks before.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor

from prl.blocks.routing import RouteLog


class SequenceShard(Protocol):
    """A rank's place among those that share the packed tokens: share `index` of `count`."""

    @property
    def index(self) -> int: ...

    @property
    def count(self) -> int: ...

    @property
    def divides_heads(self) -> bool:
        """Whether attention with a multiple of `count` heads exchanges heads for tokens (Ulysses), not keys and values.
        """

    def whole(self, x: Tensor) -> Tensor:
        """x [T, ...] of this rank -> [count * T, ...] of all ranks in order; gradients add up. A collective."""

    def by_heads(self, x: Tensor) -> Tensor:
        """x [T, count * H, D] of this rank -> [count * T, H, D]: all tokens, and this rank's heads. A collective."""

    def by_tokens(self, x: Tensor) -> Tensor:
        """The way back: [count * T, H, D] -> [T, count * H, D]. A collective."""


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
    shard: SequenceShard | None = None
    """Who holds the rest of the packed tokens; None: nobody does."""
    earlier: int = 0
    """Tokens of the first sequence that lie on earlier ranks."""
    whole: Context | None = None
    """Of all ranks' tokens together; None where `shard` is."""
    shared: SharedPrefixes | None = None
    """When training, and the model `shares_prefixes`: what it is given are `U` rows, and so is `positions`. Only what
    looks at other tokens of a sequence expands them to the `T` tokens that `lengths` count."""
    routes: RouteLog | None = None
    """Where tokens are, were or shall be sent to experts; None: routers choose and nobody wants to know."""
    memo: dict[Any, Any] = attrs.field(factory=dict)
    """What a layer computed that the next layers can share: rope tables, masks."""

    @classmethod
    def packed(
        cls, cu_seqlens: Tensor, shared: SharedPrefixes | None = None, *, shard: SequenceShard | None = None
    ) -> Context:
        """For training: cu_seqlens [S + 1] int, host side; positions are built on the current default device.

        With a shard, `cu_seqlens` are those of all ranks' tokens, whose number is a multiple of the ranks'; nothing is
        shared then.
        """
        bounds = cu_seqlens.tolist()
        whole = None if shard is None else cls.packed(cu_seqlens)
        longest = max((b - a for a, b in pairwise(bounds)), default=0)
        bounds, earlier = _share(bounds, shard)
        lengths = tuple(b - a for a, b in pairwise(bounds))
        positions = _positions(lengths, first=[earlier, *[0] * (len(lengths) - 1)] if lengths else [])
        if shared is not None:
            positions = shared.collect(positions)
        return cls(
            lengths=lengths,
            positions=positions,
            longest=longest,
            shared=shared,
            shard=shard,
            earlier=earlier,
            whole=whole,
        )

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

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """[S + 1] int32 each, where sequences begin and end among the new tokens, and among those with the earlier."""
        if "bounds" not in self.memo:
            device = self.positions.device
            new = _ends(self.lengths, device)
            self.memo["bounds"] = (
                new,
                _ends((self.lengths[0] + self.earlier, *self.lengths[1:]), device) if self.earlier else new,
            )
        bounds: tuple[Tensor, Tensor] = self.memo["bounds"]
        return bounds

    def with_earlier(self, x: Tensor) -> Tensor:
        """x [T, ...] -> [earlier + T, ...]: the first sequence's tokens on earlier ranks come first. A collective."""
        if self.shard is None:
            return x
        start = self.shard.index * len(x)
        return self.shard.whole(x)[start - self.earlier : start + len(x)]


def _ends(lengths: Sequence[int], device: torch.device) -> Tensor:
    """[S + 1] int32"""
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def _share(bounds: list[int], shard: SequenceShard | None) -> tuple[list[int], int]:
    """Bounds of the sequences in a rank's share of the tokens, and how many tokens of the first lie before it."""
    if shard is None:
        return bounds, 0
    rows = bounds[-1] // shard.count
    start, end = shard.index * rows, (shard.index + 1) * rows
    begun = max(bound for bound in bounds if bound <= start)
    inside = [bound for bound in bounds if start < bound < end]
    return [start, *inside, end], start - begun


def _positions(lengths: Sequence[int], *, first: Sequence[int]) -> Tensor:
    """[T] `first[s], first[s] + 1, ...` for each sequence, on the current default device."""
    starts, total = [], 0
    for n, position in zip(lengths, first, strict=True):
        starts.append(total - position)
        total += n
    offsets = torch.tensor(starts, dtype=torch.int64)
    return torch.arange(total) - offsets.repeat_interleave(torch.tensor(lengths, dtype=torch.int64), output_size=total)
