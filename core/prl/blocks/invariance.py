"""Products whose rows do not depend on the rows beside them, where that is asked for.

How many rows a matrix product has decides which kernel computes it, so a row can come out differently in its last bits
beside other rows. That is harmless in training, where the rows of a batch are the batch's. In serving they belong to
requests that came together by chance: inside `batch_invariant`, what one of them gets depends on it alone (He et al.
2025, "Defeating Nondeterminism in LLM Inference"). Holds for float32 on a CPU, in one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import functional

TILE_ROWS = 32
"""Rows of every product: which kernel a library takes depends on their number, and the number differs by processor."""
FEWEST_ROWS = 4
"""Of queries that attend together: for fewer, MKL's kernel depends on how many keys there are (tested)."""
FEWEST_KEYS = 64
"""torch multiplies small matrices in a batch by itself and leaves larger ones to MKL; attention over so many keys is
larger for any head."""
_WANTED: ContextVar[bool] = ContextVar("batch_invariant", default=False)


@contextmanager
def batch_invariant(wanted: bool) -> Iterator[None]:
    """Inside, in this thread: `wanted()` is as told."""
    token = _WANTED.set(wanted)
    try:
        yield
    finally:
        _WANTED.reset(token)


def wanted() -> bool:
    """Whether rows must not depend on each other here."""
    return not torch.compiler.is_compiling() and _WANTED.get()


def enough_keys(longest: int, room: int) -> int:
    """How many of a cache's `room` keys attention should look at, masked, where the longest sequence has `longest`."""
    return max(longest, min(FEWEST_KEYS, room)) if wanted() else longest


def in_tiles(x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """x [T, I] -> [T, O]: `product` of `TILE_ROWS` rows at a time, rows of zeros added to the last."""
    tiles = torch.split(functional.pad(x, (0, 0, 0, -len(x) % TILE_ROWS)), TILE_ROWS)
    return torch.cat([product(tile) for tile in tiles])[: len(x)]


def enough_rows(x: Tensor) -> Tensor:
    """x [..., N, D] with rows of zeros added where there are fewer than `FEWEST_ROWS`."""
    missing = FEWEST_ROWS - x.shape[-2]
    return functional.pad(x, (0, 0, 0, missing)) if missing > 0 else x
