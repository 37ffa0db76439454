"""Plugin `cispo`: the CISPO loss. This module is imported wherever a run is composed, so it imports no torch."""

from __future__ import annotations

import attrs
from attrs import validators
from prl import hookimpl, option
from prl.compose.config import LossConfig
from prl.providers import Loss


@attrs.frozen(kw_only=True)
class CispoConfig(LossConfig):
    """`[losses.rl] type = "cispo"`."""

    clip_high: float = option(5.0, help="upper bound of the importance ratio", validator=validators.gt(0))


@hookimpl
def prl_losses() -> list[Loss]:
    return [
        Loss(
            name="cispo",
            config=CispoConfig,
            summary="policy gradient under a detached, clipped importance ratio",
            build="prl_cispo.loss:build",
        )
    ]
