"""The AdamW optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import attrs
from attrs import validators
from prl import hookimpl, option
from prl.compose.config import OptimizerConfig
from prl.providers import Optimizer


@attrs.frozen(kw_only=True)
class AdamWConfig(OptimizerConfig):
    """`[optimizer]` with `type = "adamw"`."""

    keeps_float32: ClassVar[bool] = True

    betas: tuple[float, float] = option(
        (0.9, 0.999),
        help="decay rates of the running means of the gradient and of its square",
        validator=validators.deep_iterable(validators.and_(validators.ge(0.0), validators.lt(1.0))),
    )
    eps: float = option(1e-8, help="added to the root of the second mean", validator=validators.gt(0))
    weight_decay: float = option(0.01, help="decoupled decay of matrices", validator=validators.ge(0))


@hookimpl
def prl_optimizers() -> Iterable[Optimizer]:
    yield Optimizer(
        name="adamw",
        config=AdamWConfig,
        summary="Adam with decoupled weight decay, fused where torch has a kernel",
        build="prl_adamw.adamw:build",
    )
