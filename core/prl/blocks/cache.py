"""What attention remembers of sequences that are being generated: one cache per layer.

Written and read by `prl.blocks.attend` and the mixers; rows are handed out by the engine. What lies beyond the tokens
of a row is finite and never attended to. A mixer that remembers something else than one entry per token brings its own
cache, with the same `copy_row` and `prefix_reusable`.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from prl.blocks.context import Context


class KeysAndValues(Protocol):
    """What `attend` needs of a cache."""

    def write(self, k: Tensor, v: Tensor, context: Context) -> None:
        """k, v [T, heads, D] of the new tokens, each to its row and position."""

    def read(self, context: Context) -> tuple[Tensor, Tensor]:
        """k, v [S, heads, context.longest, D] of the context's sequences."""


class TokenCache:
    """Room for `rows` sequences of `length` tokens, with `parts` vectors [size] per token and head."""

    prefix_reusable: ClassVar[bool] = True
    """The first tokens of a row can be used without the rest."""

    def __init__(
        self,
        *,
        rows: int,
        length: int,
        heads: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        parts: int = 1,
    ) -> None:
        self.stored = torch.zeros(parts, rows, heads, length, size, dtype=dtype, device=device)
        self.length = length

    def store(self, new: Tensor, context: Context) -> None:
        """new [parts * T, heads, size] of the new tokens, part after part, each to its row and position."""
        parts, _, heads, _, size = self.stored.shape
        by_token = new.reshape(parts, -1, heads, size).transpose(0, 1)
        self.stored[:, _rows_of_tokens(context), :, context.positions] = by_token

    def stored_of(self, context: Context, part: int = 0) -> Tensor:
        """[S, heads, context.longest, size] of the context's sequences; a view when `rows` is a slice."""
        return self.stored[part, context.rows, :, : context.longest]

    def copy_row(self, source: int, target: int, length: int) -> None:
        """The first `length` tokens of one row into another."""
        self.stored[:, target, :, :length] = self.stored[:, source, :, :length]


class KeyValueCache(TokenCache):
    """Keys and values, for grouped-query attention.

    Example:
        >>> cache = KeyValueCache(rows=4, length=32, kv_heads=2, head_dim=8, dtype=torch.float32, device="cpu")
        >>> cache.copy_row(0, 3, 10)  # row 3 now starts with the ten tokens of row 0
    """

    def __init__(
        self, *, rows: int, length: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__(parts=2, rows=rows, length=length, heads=kv_heads, size=head_dim, dtype=dtype, device=device)
        self.k, self.v = self.stored.unbind()  # [rows, kv_heads, length, head_dim]

    def write(self, k: Tensor, v: Tensor, context: Context) -> None:
        """k, v [T, kv_heads, head_dim] of the new tokens, each to its row and position."""
        self.store(torch.cat((k, v)), context)

    def read(self, context: Context) -> tuple[Tensor, Tensor]:
        """k, v [S, kv_heads, context.longest, head_dim] of the context's sequences; views when `rows` is a slice."""
        rows = context.rows
        return self.k[rows, :, : context.longest], self.v[rows, :, : context.longest]


class SharedKeyCache(TokenCache):
    """Vectors of one head that are keys and values at once, as the latents of absorbed latent attention are."""

    def __init__(self, *, rows: int, length: int, size: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(rows=rows, length=length, heads=1, size=size, dtype=dtype, device=device)

    def write(self, k: Tensor, v: Tensor, context: Context) -> None:
        """k [T, 1, size] of the new tokens, each to its row and position; v is k."""
        self.store(k, context)

    def read(self, context: Context) -> tuple[Tensor, Tensor]:
        """The same [S, 1, context.longest, size] twice."""
        latents = self.stored_of(context)
        return latents, latents


def _rows_of_tokens(context: Context) -> Tensor:
    """[T] cache row of each token."""
    if "cache rows" not in context.memo:
        context.memo["cache rows"] = _computed_rows(context)
    rows: Tensor = context.memo["cache rows"]
    return rows


def _computed_rows(context: Context) -> Tensor:
    rows, device = context.rows, context.positions.device
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=device)
    assert rows is not None, "a context with caches has rows"
    if context.decoding:
        return rows
    return rows.repeat_interleave(torch.tensor(context.lengths, device=device), output_size=len(context.positions))
