"""Plugin `guessing`: find a number, told higher or lower after each guess; a conversation of several turns."""

from __future__ import annotations

import attrs
from attrs import validators
from prl import hookimpl, option
from prl.compose.config import EnvironmentConfig, positive
from prl.providers import Environment


@attrs.frozen(kw_only=True)
class GuessingConfig(EnvironmentConfig):
    """`[[environments]] type = "guessing"`."""

    maximum: int = option(14, help="the number is one of 0 to maximum", validator=validators.ge(4))
    guesses: int = option(4, help="most guesses", validator=positive)

    def __attrs_post_init__(self) -> None:
        needed = (self.maximum + 1).bit_length()
        if self.guesses < needed:
            raise ValueError(
                f"guesses = {self.guesses} cannot always find one of {self.maximum + 1} numbers; it takes {needed}"
            )


@hookimpl
def prl_environments() -> list[Environment]:
    return [
        Environment(
            name="guessing",
            config=GuessingConfig,
            summary="guess a number, told higher or lower after each guess (multi-turn)",
            build="prl_guessing.environment:build",
            cheap=True,
        )
    ]
