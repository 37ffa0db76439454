"""The dispatch by DeepEP, where experts are divided over ranks; where they are not, the reference's.

Weights are applied where the experts are, in bfloat16, and what the experts of one rank make of a token is summed and
rounded before it travels back: sums are the reference's to bfloat16's precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prl.blocks.moe import RunExperts
from prl.blocks.moe import dispatch as seam
from prl.errors import UserError
from prl.train.parallel import deepep
from torch import Tensor, nn

from prl_deepep import DeepEpConfig


def build(config: DeepEpConfig) -> Callable[..., Tensor]:
    """UserError with what is missing where it cannot run."""
    if missing := deepep.missing():
        raise UserError(
            f"kernels.dispatch: kernel 'deepep' is unavailable: {missing}; "
            "leave the section out, and tokens travel by all-to-all"
        )
    return dispatch


def dispatch(x: Tensor, weights: Tensor, chosen: Tensor, experts: nn.Module, run: RunExperts, count: int) -> Tensor:
    """As `prl.blocks.moe.dispatch`."""
    if run.group is None:
        return seam.reference(x, weights, chosen, experts, run, count)
    deepep.check(x)
    rows, counts, arrived = deepep.send(x, weights, chosen, run.group, count)
    outputs: Any = experts(rows, counts.cumsum(0).int())
    return deepep.back(outputs, arrived).to(x.dtype)
