"""Drawing one token per row, all rows in one pass, reproducibly.

Randomness is counter-based: the uniform number behind a token depends on the row's seed and the token's position and on
nothing else, so a request gets the same tokens alone or in any batch (up to logits that differ in the last bit).
Knows logits and numbers, nothing of requests or caches. Called by `batch.py`.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

GOLDEN = 0x9E3779B97F4A7C15
"""Increment of splitmix64's counter (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""
_MASK = (1 << 64) - 1
_BLOCK = 256


def stream(seed: int, position: int) -> int:
    """Counter of a row before the token at `position`; it grows by GOLDEN per token. Seeds are mixed first, so that the
    streams of `seed` and `seed + 1` have nothing in common."""
    mixed = int(_mix(np.array([(seed * GOLDEN + GOLDEN) & _MASK], dtype=np.uint64))[0])
    return (mixed + position * GOLDEN) & _MASK


def uniforms(counters: NDArray[np.uint64]) -> NDArray[np.float64]:
    """[n] counters -> [n] numbers in [0, 1), multiples of 2^-52."""
    numbers: NDArray[np.float64] = (_mix(counters) >> np.uint64(12)) * np.float64(2.0**-52)
    return numbers


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finalizer."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def draw(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """One token per row by inverting the distribution function.

    Args:
        logprobs: [n, vocab] normalised log-probabilities, float32; -inf is never drawn.
        uniform: [n] float64 in [0, 1).

    Returns:
        [n] int64.
    """
    probabilities = logprobs.exp()
    if probabilities.shape[1] <= 4 * _BLOCK:
        return _invert(probabilities, uniform)
    return _invert_in_blocks(probabilities, uniform)


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    # Sums in float64: in float32 the tail's tokens would be lost in the rounding of a sum near 1. `uniform` is at most
    # 1 - 2^-52, so the target stays below the last sum and the first sum above it belongs to a token that can occur.
    # Only where sums are no numbers is none above it: the clamp lets such a row go on until it is reported.
    sums = probabilities.cumsum(1, dtype=torch.float64)
    drawn = torch.searchsorted(sums, (uniform * sums[:, -1])[:, None], right=True)[:, 0]
    return drawn.clamp(max=probabilities.shape[1] - 1)


def _invert_in_blocks(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The same in two levels, block then token: a large vocabulary is read once and never summed up in float64."""
    rows, vocab = probabilities.shape
    blocks = pad(probabilities, (0, -vocab % _BLOCK)).view(rows, -1, _BLOCK)
    mass = blocks.sum(2).double()
    sums = mass.cumsum(1)
    target = (uniform * sums[:, -1])[:, None]
    block = torch.searchsorted(sums, target, right=True).clamp(max=blocks.shape[1] - 1)
    chosen = mass.gather(1, block)
    within = ((target - sums.gather(1, block) + chosen) / chosen).clamp(0.0, 1.0 - 2.0**-52)
    inside = _invert(blocks[torch.arange(rows, device=blocks.device), block[:, 0]], within[:, 0])
    return block[:, 0] * _BLOCK + inside
