"""The SignSGD optimizer, which remembers nothing."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from attrs import validators
from prl import hookimpl, option
from prl.compose.config import OptimizerConfig
from prl.providers import Optimizer


@attrs.frozen(kw_only=True)
class SignSgdConfig(OptimizerConfig):
    """`[optimizer]` with `type = "sign_sgd"`."""

    weight_decay: float = option(0.0, help="decoupled decay of matrices", validator=validators.ge(0))


@hookimpl
def prl_optimizers() -> Iterable[Optimizer]:
    yield Optimizer(
        name="sign_sgd",
        config=SignSgdConfig,
        summary="every weight moves by the learning rate; no state, for models that barely fit",
        build="prl_sign_sgd.sign_sgd:build",
    )
