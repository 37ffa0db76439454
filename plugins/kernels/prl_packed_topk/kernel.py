"""`select_topk` through `torch.topk`, which selects without sorting everything but breaks ties as the layout has it.

Score and place of a token become one integer, larger for a higher score and, of equal scores, for an earlier token.
Then there are no ties, and the choice is the stable sort's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prl_packed_topk import PackedTopkConfig

_LOW = (1 << 32) - 1


def build(config: PackedTopkConfig) -> Callable[[Tensor, int], Tensor]:
    return select_topk


def select_topk(scores: Tensor, count: int) -> Tensor:
    """scores [..., K] float32, -inf where a token cannot be seen -> the best [..., min(count, K)] int64, or -1."""
    keys = scores.shape[-1]
    bits = (scores + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0: they are equal and must look it
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the bits of negative numbers grow with their size
    earlier = torch.arange(keys - 1, -1, -1, device=scores.device)
    best = ((ordered.long() << 32) | earlier).topk(min(count, keys), -1).values
    chosen = keys - 1 - (best & _LOW)
    return chosen.masked_fill_(scores.gather(-1, chosen) == float("-inf"), -1)
