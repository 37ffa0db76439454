"""Plugin `deepep`: tokens travel to experts on other ranks by DeepEP."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from prl import hookimpl
from prl.compose.config import KernelConfig
from prl.providers import Kernel


@attrs.frozen(kw_only=True)
class DeepEpConfig(KernelConfig):
    """`[kernels.dispatch]` with `type = "deepep"`."""


@hookimpl
def prl_kernels() -> Iterable[Kernel]:
    yield Kernel(
        name="deepep",
        config=DeepEpConfig,
        seam="dispatch",
        summary="a token travels once to each rank with experts of its choice, by DeepEP 2 on Hopper GPUs",
        requires=("deep_ep",),
        build="prl_deepep.kernel:build",
        device="cuda",
    )
