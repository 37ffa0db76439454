"""The dispatch by DeepEP, where experts are divided over ranks; where they are not, the reference's.

Weights are applied where the experts are, in bfloat16, and what the experts of one rank make of a token is summed and
rounded before it travels back: sums are the reference's to bfloat16's precision.
"""

from __future__ import annotations

from typing import Any

import attrs
from prl.blocks.moe import RunExperts
from prl.blocks.moe import dispatch as seam
from prl.errors import UserError
from torch import Tensor, nn

from prl_deepep import DeepEpConfig, exchange


@attrs.frozen
class Dispatch:
    """A kernel of the seam `dispatch`."""

    def __call__(
        self, x: Tensor, weights: Tensor, chosen: Tensor, experts: nn.Module, run: RunExperts, count: int
    ) -> Tensor:
        """As `prl.blocks.moe.dispatch`."""
        if run.group is None:
            return seam.reference(x, weights, chosen, experts, run, count)
        exchange.check(x)
        rows, counts, arrived = exchange.send(x, weights, chosen, run.group, count)
        outputs: Any = experts(rows, counts.cumsum(0).int())
        return exchange.back(outputs, arrived).to(x.dtype)

    def close(self) -> None:
        exchange.close()


dispatch = Dispatch()


def build(config: DeepEpConfig) -> Dispatch:
    """UserError with what is missing where it cannot run."""
    if missing := exchange.missing():
        raise UserError(
            f"kernels.dispatch: kernel 'deepep' is unavailable: {missing}; "
            "leave the section out, and tokens travel by all-to-all"
        )
    return dispatch
