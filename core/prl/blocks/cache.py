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
        self._stored = torch.zeros(2, rows, kv_heads, length, head_dim, dtype=dtype, device=device)
        self.k, self.v = self._stored.unbind()  # [rows, kv_heads, length, head_dim]
        self.length = length

    def write(self, k: Tensor, v: Tensor, context: Context) -> None:
        """k, v [T, kv_heads, head_dim] of the new tokens, each to its row and position."""
        new = torch.cat((k, v)).view(-1, k.shape[-1])
        self._stored.view(-1, k.shape[-1]).index_copy_(0, self._places(context), new)

    def read(self, context: Context) -> tuple[Tensor, Tensor]:
        """k, v [S, kv_heads, context.longest, head_dim] of the context's sequences; views when `rows` is a slice."""
        rows = context.rows
        return self.k[rows, :, : context.longest], self.v[rows, :, : context.longest]

    def copy_row(self, source: int, target: int, length: int) -> None:
        """The first `length` tokens of one row into another."""
        self._stored[:, target, :, :length] = self._stored[:, source, :, :length]

    def _places(self, context: Context) -> Tensor:
        """[2 * T * kv_heads] where each new key, then each new value, lies in the storage seen as [..., head_dim]."""
        rows, heads, length, _ = self.k.shape
        key = ("cache places", rows, heads, length)
        if key not in context.memo:
            head = torch.arange(heads, device=self.k.device)
            first = (_rows_of_tokens(context)[:, None] * heads + head) * length
            keys = (first + context.positions[:, None]).flatten()
            context.memo[key] = torch.cat((keys, keys + rows * heads * length))
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
