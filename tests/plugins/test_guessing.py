"""Guessing a number: hints, rewards, and demonstrations that always get there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from prl.providers import Score
from prl.types import Message
from prl_guessing import GuessingConfig
from prl_guessing.environment import Guessing, build


class Conversation:
    """A player with a fixed list of guesses."""

    def __init__(self, guesses: Sequence[str]) -> None:
        self.state: dict[str, Any] = {}
        self.heard: list[str] = []
        self._guesses = iter(guesses)

    async def ask(self, messages: Sequence[Message]) -> Message:
        self.heard += [m["content"] for m in messages]
        return {"role": "assistant", "content": next(self._guesses)}


def environment(**settings: int) -> Guessing:
    return build(GuessingConfig(**settings), seed=0)


def task_with(env: Guessing, secret: int) -> Any:
    split = "eval" if secret % 5 == 4 else "train"
    tasks = [env.task(split, index) for index in range(env.size(split))]
    return next(task for task in tasks if task.data["secret"] == secret)


def play(env: Guessing, secret: int, *guesses: str) -> tuple[list[str], Score]:
    async def scenario() -> tuple[list[str], Score]:
        conversation: Any = Conversation(guesses)
        task = task_with(env, secret)
        await env.rollout(task, conversation)
        (score,) = await env.score(task, [conversation])
        return conversation.heard, score

    return asyncio.run(scenario())


def test_every_number_is_a_task_of_exactly_one_split() -> None:
    env = environment(maximum=20, guesses=5)
    train = [env.task("train", index).data["secret"] for index in range(env.size("train"))]
    held_out = [env.task("eval", index).data["secret"] for index in range(env.size("eval"))]
    assert sorted(train + held_out) == list(range(21))
    assert held_out == [4, 9, 14, 19]


def test_hints_lead_to_the_number() -> None:
    heard, score = play(environment(), 9, "7", " 11 ", "9")
    assert heard == ["guess 0 to 14", "higher", "lower"]
    assert score == Score(reward=0.75, metrics={"accuracy": 1.0})


@pytest.mark.parametrize(("guesses", "reward"), [("9", 1.0), ("8 9", 0.875), ("1 2 3 9", 0.625)])
def test_fewer_guesses_are_worth_more(guesses: str, reward: float) -> None:
    assert play(environment(), 9, *guesses.split())[1].reward == reward


def test_what_is_no_number_costs_a_guess_and_the_last_one_ends_it() -> None:
    heard, score = play(environment(), 9, "nine", "", "-9", "²")
    assert heard == ["guess 0 to 14", "a number", "a number", "a number"]
    assert score == Score(reward=0.0, metrics={"accuracy": 0.0})


@pytest.mark.parametrize(("maximum", "guesses"), [(4, 3), (14, 4), (15, 5), (100, 7)])
def test_demonstrations_win_within_the_guesses(maximum: int, guesses: int) -> None:
    env = environment(maximum=maximum, guesses=guesses)
    for secret in range(maximum + 1):
        messages = env.demonstration(task_with(env, secret))
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        heard, score = play(env, secret, *said)
        assert [m["content"] for m in messages if m["role"] == "user"] == heard
        assert [m["role"] for m in messages] == ["user", "assistant"] * len(said)
        assert score.metrics == {"accuracy": 1.0}


def test_too_few_guesses_are_refused() -> None:
    with pytest.raises(ValueError, match="guesses = 4 cannot always find one of 16 numbers; it takes 5"):
        GuessingConfig(maximum=15, guesses=4)
