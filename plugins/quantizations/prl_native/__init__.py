"""Number formats that every device computes in: fp32, and bf16 for what travels and is served."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import attrs
from prl import hookimpl, option
from prl.compose.config import QuantizationConfig, Run
from prl.providers import Quantization


@attrs.frozen(kw_only=True)
class Fp32Config(QuantizationConfig):
    """`[quantization]` with `type = "fp32"`."""


@attrs.frozen(kw_only=True)
class Bf16Config(QuantizationConfig):
    """`[quantization]` with `type = "bf16"`."""

    parameters: Literal["float32", "bfloat16"] = option(
        "float32",
        help="what the trainer holds its parameters and computes in; bfloat16 is what GPUs are fast in, and wants an "
        "optimizer that keeps float32 copies, such as adamw",
    )


@hookimpl
def prl_quantizations() -> Iterable[Quantization]:
    yield Quantization(
        name="fp32",
        config=Fp32Config,
        summary="trains, travels and serves in float32",
        build="prl_native.formats:fp32",
    )
    yield Quantization(
        name="bf16",
        config=Bf16Config,
        summary="travels and serves in bfloat16, trains in float32 or bfloat16",
        build="prl_native.formats:bf16",
    )


@hookimpl
def prl_validate(run: Run) -> Iterable[str]:
    """Steps smaller than bfloat16 can show must not be lost."""
    narrow = isinstance(run.quantization, Bf16Config) and run.quantization.parameters == "bfloat16"
    if narrow and not run.optimizer.keeps_float32:
        yield (
            f'quantization.parameters = "bfloat16": {type(run.optimizer).__name__} keeps no float32 copies and '
            'would round most of its steps away; use optimizer.type = "adamw", or parameters = "float32"'
        )
