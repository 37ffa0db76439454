"""Plugin `functions`: prompts from a JSONL file, rewards from a Python function of the user's own."""

from __future__ import annotations

import attrs
from attrs import validators
from prl import hookimpl, option
from prl.compose.config import EnvironmentConfig
from prl.providers import Environment


@attrs.frozen(kw_only=True)
class FunctionsConfig(EnvironmentConfig):
    """`[[environments]] type = "functions"`. Relative paths start where `prl launch` is run.

    Example:
        [[environments]]
        type = "functions"
        file = "sums.jsonl"                # {"prompt": "1 + 1 =", "answer": "2"}
        reward = "rewards.py:exact"        # def exact(completion, answer): return float(completion == answer)
    """

    file: str = option(help="JSONL: one object per line with `prompt` or `messages`, and whatever the function wants")
    reward: str = option(help='"package.module:function" or "path/to/file.py:function"')
    eval_share: float = option(
        0.1, help="share of the prompts held out, chosen by their hash", validator=[validators.ge(0), validators.lt(1)]
    )
    eval_file: str = option("", help="JSONL of held-out rows, instead of a share of file")


@hookimpl
def prl_environments() -> list[Environment]:
    return [
        Environment(
            name="functions",
            config=FunctionsConfig,
            summary="a Python reward function over a JSONL of prompts",
            build="prl_functions.environment:build",
        )
    ]
