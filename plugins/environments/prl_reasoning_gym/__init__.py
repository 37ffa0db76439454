"""Plugin `reasoning_gym`: the procedural tasks of the reasoning-gym package, by name, with their own scorers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from prl import hookimpl, option
from prl.compose.config import EnvironmentConfig, positive
from prl.providers import Environment


@attrs.frozen(kw_only=True)
class Family:
    """One entry of `mix`."""

    dataset: str = option(help="name of a reasoning_gym dataset, e.g. spell_backward")
    weight: float = option(1.0, help="share of the tasks", validator=positive)
    parameters: Mapping[str, Any] = option(attrs.Factory(dict), help="the dataset's own parameters: difficulty")


@attrs.frozen(kw_only=True)
class ReasoningGymConfig(EnvironmentConfig):
    """`[[environments]] type = "reasoning_gym"`.

    Example:
        [[environments]]
        type = "reasoning_gym"
        dataset = "spell_backward"
        parameters = { min_word_len = 3, max_word_len = 6 }
    """

    dataset: str = option("", help="name of a reasoning_gym dataset; or name several in mix")
    parameters: Mapping[str, Any] = option(attrs.Factory(dict), help="the dataset's own parameters: difficulty")
    mix: tuple[Family, ...] = option((), help="several datasets: {dataset, weight, parameters} each")
    size: int = option(2000, help="distinct training tasks", validator=positive)
    eval_size: int = option(200, help="distinct held-out tasks", validator=positive)
    instruction: str = option("", help="system message put before each question")
    partial_credit: bool = option(True, help="false: the reward is 1 for a full score and 0 for anything less")

    def __attrs_post_init__(self) -> None:
        if bool(self.dataset) == bool(self.mix):
            raise ValueError(f"needs exactly one of dataset and mix, got {'both' if self.mix else 'neither'}")
        if self.mix and self.parameters:
            raise ValueError("parameters belong to the entries of mix, not beside it")

    @property
    def families(self) -> tuple[Family, ...]:
        """What is mixed; a single dataset is a mix of one."""
        return self.mix or (Family(dataset=self.dataset, parameters=self.parameters),)


@hookimpl
def prl_environments() -> list[Environment]:
    return [
        Environment(
            name="reasoning_gym",
            config=ReasoningGymConfig,
            summary="procedural tasks of the reasoning-gym package, mixed by weight",
            requires=("reasoning_gym",),
            build="prl_reasoning_gym.environment:build",
        )
    ]
