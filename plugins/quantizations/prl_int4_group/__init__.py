"""INT4 for routed experts, 32 weights to a scale, as Kimi-K2's native checkpoints (compressed-tensors) have it.

The trainer keeps float32 weights and rounds them in the experts' forward pass to what engines compute with; gradients
pass through unchanged (quantisation-aware training, arXiv:2602.02276). This is the reference, in plain torch: it runs
on a CPU, and the embedded engine computes in bfloat16 what it restores.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from prl import hookimpl, option
from prl.compose.config import QuantizationConfig
from prl.providers import Quantization


@attrs.frozen(kw_only=True)
class Int4GroupConfig(QuantizationConfig):
    """`[quantization]` with `type = "int4_group"`."""

    fake_quantization: bool = option(True, help="the trainer's experts round their weights as engines see them")


@hookimpl
def prl_quantizations() -> Iterable[Quantization]:
    yield Quantization(
        name="int4_group",
        config=Int4GroupConfig,
        summary="trains in float32, experts travel in 4 bits with a scale per 32 weights",
        build="prl_int4_group.groups:int4_group",
    )
