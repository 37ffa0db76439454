"""FP8 in blocks of 128 x 128, as DeepSeek-V3 (arXiv:2412.19437, section 3.3) and GLM-5's `-FP8` checkpoints have it.

Every matrix the model does not except travels as float8_e4m3 with one float32 scale per block (`weight_scale_inv`).
This is the reference, in plain torch: it runs on a CPU, and the embedded engine computes in bfloat16 what it restores.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from prl import hookimpl, option
from prl.compose.config import QuantizationConfig
from prl.providers import Quantization


@attrs.frozen(kw_only=True)
class Fp8BlockConfig(QuantizationConfig):
    """`[quantization]` with `type = "fp8_block"`."""

    fake_quantization: bool = option(True, help="the trainer's forward pass rounds weights as engines see them")


@hookimpl
def prl_quantizations() -> Iterable[Quantization]:
    yield Quantization(
        name="fp8_block",
        config=Fp8BlockConfig,
        summary="trains in float32, travels in float8 with a scale per block of 128 x 128",
        build="prl_fp8_block.blocks:fp8_block",
    )
