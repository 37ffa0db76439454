"""The environment: the policy guesses until it is right or has no guesses left.

    user: guess 0 to 14   assistant: 7   user: higher   assistant: 11   user: lower   assistant: 9

Every fifth number is held out. Nothing here waits or computes, so it runs inside the controller.
"""

from __future__ import annotations

from collections.abc import Sequence

from prl.providers import Score
from prl.rollout.conversation import Conversation
from prl.types import Message, Split, Task

from prl_guessing import GuessingConfig

_HELD_OUT = 5


class Guessing:
    def __init__(self, config: GuessingConfig) -> None:
        self._maximum = config.maximum
        self._guesses = config.guesses
        numbers = range(config.maximum + 1)
        self._secrets: dict[Split, list[int]] = {
            "train": [n for n in numbers if n % _HELD_OUT != _HELD_OUT - 1],
            "eval": [n for n in numbers if n % _HELD_OUT == _HELD_OUT - 1],
        }

    def size(self, split: Split) -> int:
        return len(self._secrets[split])

    def task(self, split: Split, index: int) -> Task:
        opening = _says("user", f"guess 0 to {self._maximum}")
        return Task(index=index, messages=(opening,), data={"secret": self._secrets[split][index]})

    async def rollout(self, task: Task, conversation: Conversation) -> None:
        secret = task.data["secret"]
        messages: Sequence[Message] = task.messages
        for guess in range(1, self._guesses + 1):
            reply = await conversation.ask(messages)
            hint = _hint(str(reply["content"]), secret)
            if hint is None:
                conversation.state["found_after"] = guess
                return
            messages = [_says("user", hint)]

    async def score(self, task: Task, conversations: Sequence[Conversation]) -> list[Score]:
        return [self._score(conversation.state.get("found_after")) for conversation in conversations]

    def _score(self, found_after: int | None) -> Score:
        """1 for the first guess, falling to just above 0.5 for the last; 0 when the number was not found."""
        if found_after is None:
            return Score(reward=0.0, metrics={"accuracy": 0.0})
        return Score(reward=1.0 - 0.5 * (found_after - 1) / self._guesses, metrics={"accuracy": 1.0})

    def demonstration(self, task: Task) -> list[Message]:
        """Binary search."""
        low, high = 0, self._maximum
        messages = list(task.messages)
        while True:
            guess = (low + high) // 2
            messages.append(_says("assistant", str(guess)))
            hint = _hint(str(guess), task.data["secret"])
            if hint is None:
                return messages
            messages.append(_says("user", hint))
            low, high = (guess + 1, high) if hint == "higher" else (low, guess - 1)

    async def aclose(self) -> None:
        """Nothing is held open."""


def _says(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _hint(reply: str, secret: int) -> str | None:
    """What a guess is answered with; None when it is right."""
    digits = reply.strip()
    if not (digits.isascii() and digits.isdigit()):
        return "a number"
    guess = int(digits[:9])
    if guess == secret:
        return None
    return "higher" if guess < secret else "lower"


def build(config: GuessingConfig, seed: int) -> Guessing:
    """The seed plays no part: the tasks are all the numbers there are."""
    return Guessing(config)
