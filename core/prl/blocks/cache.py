"""The keys and values of sequences that are being generated, one `KeyValueCache` per layer.

Written and read by `prl.blocks.attend`; rows are handed out by the engine. What lies beyond the tokens of a row is
finite and never attended to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prl.blocks.context import Context


class KeyValueCache:
    """Room for `rows` sequences of `length` tokens.

    Example:
        >>> cache = KeyValueCache(rows=4, length=32, kv_heads=2, head_dim=8, dtype=torch.float32, device="cpu")
        >>> cache.copy_row(0, 3, 10)  # row 3 now starts with the ten tokens of row 0
    """

    def __init__(
        self, *, rows: int, length: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (rows, kv_heads, length, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)  # [rows, kv_heads, length, head_dim]
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.length = length

    def write(self, k: Tensor, v: Tensor, context: Context) -> None:
        """k, v [T, kv_heads, head_dim] of the new tokens, each to its row and position."""
        places = self._places(context)
        for stored, new in ((self.k, k), (self.v, v)):
            stored.view(-1, stored.shape[-1]).index_copy_(0, places, new.reshape(-1, new.shape[-1]))

    def read(self, context: Context) -> tuple[Tensor, Tensor]:
        """k, v [S, kv_heads, context.longest, head_dim] of the context's sequences; views when their rows are a slice."""
        rows = context.rows
        return self.k[rows, :, : context.longest], self.v[rows, :, : context.longest]

    def copy_row(self, source: int, target: int, length: int) -> None:
        """The first `length` tokens of one row into another."""
        self.k[target, :, :length] = self.k[source, :, :length]
        self.v[target, :, :length] = self.v[source, :, :length]

    def _places(self, context: Context) -> Tensor:
        """[T * kv_heads] row of each new vector in the cache seen as [rows * kv_heads * length, head_dim]."""
        heads = self.k.shape[1]
        key = ("cache places", heads, self.length)
        if key not in context.memo:
            head = torch.arange(heads, device=self.k.device)
            first = (_rows_of_tokens(context)[:, None] * heads + head) * self.length
            context.memo[key] = (first + context.positions[:, None]).flatten()
        places: Tensor = context.memo[key]
        return places


def _rows_of_tokens(context: Context) -> Tensor:
    """[T] cache row of each token."""
    rows, device = context.rows, context.positions.device
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=device)
    assert rows is not None, "a context with caches has rows"
    if context.decoding:
        return rows
    return rows.repeat_interleave(torch.tensor(context.lengths, device=device), output_size=len(context.positions))
