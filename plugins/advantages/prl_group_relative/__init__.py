"""Plugin `group_relative`: credit from comparing a rollout with its siblings."""

from __future__ import annotations

import attrs
from prl import hookimpl, option
from prl.compose.config import AdvantageConfig
from prl.providers import Advantage


@attrs.frozen(kw_only=True)
class GrpoConfig(AdvantageConfig):
    """`[advantage] type = "grpo"`."""

    normalize: bool = option(False, help="divide by the standard deviation of the group's rewards")


@hookimpl
def prl_advantages() -> list[Advantage]:
    return [
        Advantage(
            name="grpo",
            config=GrpoConfig,
            summary="reward minus the mean reward of the group",
            build="prl_group_relative.grpo:build",
        )
    ]
