"""prl's cache rows as a `Cache` of transformers: new keys and values go in, those of the whole rows come out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from prl.blocks import padding
from prl.blocks.context import Context
from prl.errors import RunError, UserError
from torch import Tensor
from transformers import Cache


class LayerCache:
    """Keys and values of one layer, [rows, heads, length, size] each: made when the first ones show their shape."""

    prefix_reusable: ClassVar[bool] = True

    def __init__(self, rows: int, length: int) -> None:
        self.rows, self.length = rows, length
        self.stored: tuple[Tensor, ...] = ()

    def copy_row(self, source: int, target: int, length: int) -> None:
        """The first `length` tokens of one row into another."""
        for tensor in self.stored:
            tensor[target, :, :length] = tensor[source, :, :length]

    def update(self, new: tuple[Tensor, Tensor], places: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """new [S, heads, L, size]; places: rows and positions to write to, and where in S and L they come from."""
        if not self.stored:
            self.stored = tuple(t.new_zeros(self.rows, t.shape[1], self.length, t.shape[3]) for t in new)
        rows, positions, sequence, step = places
        for tensor, fresh in zip(self.stored, new, strict=True):
            tensor[rows, :, positions] = fresh[sequence, :, step]
        return self.stored


class PackedCache(Cache):
    """One forward pass over the sequences of a context; knows which place of the rectangle is which cached token."""

    def __init__(self, context: Context, device: torch.device) -> None:
        super().__init__(layers=[])
        assert context.caches is not None, "only called with caches"
        assert context.past is not None, "a context with caches has past"
        self._context = context
        lengths = torch.tensor(context.lengths, device=device)
        steps = torch.arange(max(context.lengths), device=device)
        self.layout = padding.square(context.lengths, device)
        self.positions = context.past.to(device)[:, None] + steps  # [S, L]
        self._rows = torch.arange(context.caches[0].rows, device=device)[context.rows]  # [S]
        sequence, step = (steps < lengths[:, None]).nonzero(as_tuple=True)
        self._places = (self._rows[sequence], self.positions[sequence, step], sequence, step)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """[S, 1, L, longest] 0 where a token sees another, else -inf; what padding sees does not matter."""
        keys = torch.arange(self._context.longest, device=self.positions.device)
        hidden = keys > self.positions[:, None, :, None]
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """[S, heads, L, size] of the new tokens -> [S, heads, longest, size] of all."""
        assert self._context.caches is not None, "only made with caches"
        cache: LayerCache = self._context.caches[layer_idx]
        keys, values = cache.update((key_states, value_states), self._places)
        longest = self._context.longest
        return keys[self._rows, :, :longest], values[self._rows, :, :longest]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing: positions and mask are given, and already count what is cached."""
        return 0


def check_cacheable(config: Any, where: str) -> None:
    """UserError unless every layer attends to all that came before."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds != {"full_attention"} or (window and not getattr(config, "layer_types", None)):
        seen = ", ".join(sorted(kinds - {"full_attention"})) or f"a sliding window of {window}"
        raise UserError(
            f"{where}: the embedded engine caches full attention only, and this model has {seen}: serve it with "
            "another engine"
        )


def check_used(caches: Sequence[LayerCache], where: str) -> None:
    """RunError when a model did not hand over its keys and values."""
    if not all(cache.stored for cache in caches):
        raise RunError(f"{where}: this model does not use a cache of keys and values: serve it with another engine")
