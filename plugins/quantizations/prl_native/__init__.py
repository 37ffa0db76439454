"""Number formats that every device computes in: fp32, and bf16 for what travels and is served."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from prl import hookimpl
from prl.compose.config import QuantizationConfig
from prl.providers import Quantization


@attrs.frozen(kw_only=True)
class Fp32Config(QuantizationConfig):
    """`[quantization]` with `type = "fp32"`."""


@attrs.frozen(kw_only=True)
class Bf16Config(QuantizationConfig):
    """`[quantization]` with `type = "bf16"`."""


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
        summary="trains in float32, travels and serves in bfloat16",
        build="prl_native.formats:bf16",
    )
