"""The environment: a row's prompt, one reply, and the reward function's opinion of it."""

from __future__ import annotations

from collections.abc import Sequence

from prl.errors import UserError
from prl.providers import Score
from prl.rollout.conversation import Conversation
from prl.types import Message, Split, Task

from prl_functions import FunctionsConfig
from prl_functions.reward import RewardFunction
from prl_functions.rows import read, split_by_file, split_by_hash


class Functions:
    """Every row is checked when it is built, so that a run does not meet a bad one hours later."""

    def __init__(self, config: FunctionsConfig) -> None:
        self._reward = RewardFunction(config.reward)
        rows = read(config.file)
        by_file = bool(config.eval_file)
        self._rows = split_by_file(rows, read(config.eval_file)) if by_file else split_by_hash(rows, config.eval_share)
        if not self._rows["train"]:
            raise UserError(
                f"environment {config.name!r}: {config.file} leaves no rows to train on ({len(rows)} in all)"
            )
        for row in (*self._rows["train"], *self._rows["eval"]):
            self._reward.check(row)

    def size(self, split: Split) -> int:
        return len(self._rows[split])

    def task(self, split: Split, index: int) -> Task:
        row = self._rows[split][index]
        return Task(index=index, messages=row.messages, data={"row": row})

    async def rollout(self, task: Task, conversation: Conversation) -> None:
        """The reward is computed here, so that a function that fails on one reply fails that rollout alone."""
        reply = await conversation.ask(task.messages)
        conversation.state["score"] = await self._reward(str(reply["content"]), task.data["row"])

    async def score(self, task: Task, conversations: Sequence[Conversation]) -> list[Score]:
        return [conversation.state["score"] for conversation in conversations]

    def demonstration(self, task: Task) -> list[Message] | None:
        """The row's `demonstration`, else its `answer` where that is text or a number."""
        values = task.data["row"].values
        said = values.get("demonstration", values.get("answer"))
        if not isinstance(said, str | int | float):
            return None
        return [*task.messages, {"role": "assistant", "content": str(said)}]

    async def aclose(self) -> None:
        """Nothing is held open."""


def build(config: FunctionsConfig, seed: int) -> Functions:
    """The seed plays no part: rows and splits are the files'."""
    return Functions(config)
