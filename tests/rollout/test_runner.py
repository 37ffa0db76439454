"""A group end to end without a process: siblings together, failures alone, everything gone when it is cancelled."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from prl.compose.config import ModelConfig, TokenizerSection
from prl.errors import InfrastructureError, UserError
from prl.messages import RunGroup
from prl.providers import Score, Tokenizer
from prl.rollout import chatml
from prl.rollout.conversation import Conversation
from prl.rollout.runner import GroupRunner, environment_names
from prl.rollout.tokenizer import load
from prl.types import Completion, Group, Sample, Sampling, StopReason, Task, TaskRef, as_tokens
from prl_guessing import GuessingConfig
from prl_guessing.environment import build as build_guessing

END, ASSISTANT, USER = 0, 1, 2


def ref(index: int = 1, *, environment: str = "fake", split: Any = "train") -> TaskRef:
    return TaskRef(environment=environment, split=split, index=index)


def request(task: TaskRef | None = None, *, size: int = 4) -> RunGroup:
    return RunGroup(
        request=9,
        group_id=12,
        task=task or ref(),
        attempt=1,
        size=size,
        sampling=Sampling(seed=100, max_tokens=8),
        engine="http://e",
        version=3,
    )


def runner_of(composition: Any, *environments: str) -> GroupRunner:
    columns = Path("nowhere")  # nothing here is asked for its routes
    return GroupRunner(composition, composition.run, "token", columns=columns, environments=environments or ("fake",))


@pytest.fixture
def run(composition: Any) -> Callable[..., Group]:
    """Run one request to its end."""

    def run(task: TaskRef | None = None, *, size: int = 4) -> Group:
        return asyncio.run(runner_of(composition).run(request(task, size=size)))

    return run


def member(conversation: Conversation) -> int:
    return int(conversation.rollout_id.rpartition(".")[2])


def test_a_group_is_its_siblings_in_order(run: Any, engine: Any) -> None:
    group = run()
    assert (group.group_id, group.task, group.attempt, group.started_version) == (12, ref(), 1, 3)
    assert [rollout.rollout_id for rollout in group.rollouts] == ["12.0", "12.1", "12.2", "12.3"]
    assert [(asked.n, asked.sampling.seed) for asked in engine.asked] == [(4, 100)]
    prompt = engine.asked[0].prompt
    for index, rollout in enumerate(group.rollouts):
        expected = engine.reply(prompt, Sampling(seed=100 + index, max_tokens=8))
        assert rollout.tokens.tolist() == [*prompt, *expected.tokens.tolist()]
        assert rollout.reward == len(rollout.messages[-1]["content"]) == len(expected.tokens) - 1
    assert group.failures == ()


def test_the_opening_is_rendered_once(run: Any, renderer: Any) -> None:
    run()
    assert renderer.started == 1


def test_a_sibling_that_breaks_harms_no_other(run: Any, environment: Any) -> None:
    scored: list[list[str]] = []

    async def hold(task: Task, conversation: Conversation) -> None:
        await conversation.ask(task.messages)
        if member(conversation) == 2:
            raise KeyError("the tool is gone")

    async def judge(task: Task, conversations: Sequence[Conversation]) -> list[Score]:
        scored.append([conversation.rollout_id for conversation in conversations])
        return [Score(reward=1.0)] * len(conversations)

    environment.hold, environment.judge = hold, judge
    group = run()
    assert [rollout.rollout_id for rollout in group.rollouts] == ["12.0", "12.1", "12.3"]
    assert scored == [["12.0", "12.1", "12.3"]]
    (failure,) = group.failures
    assert (failure.rollout_id, failure.where) == ("12.2", "environment")
    assert failure.error.startswith("KeyError: 'the tool is gone' (")
    assert "test_runner.py:" in failure.error


def test_an_engine_that_fails_is_named_as_such(run: Any, engine: Any) -> None:
    engine.error = InfrastructureError("503 service unavailable")
    group = run()
    assert group.rollouts == ()
    assert [(f.rollout_id, f.where) for f in group.failures] == [(f"12.{i}", "engine") for i in range(4)]
    assert {f.error for f in group.failures} == {"engine http://e: 503 service unavailable"}


@pytest.mark.parametrize("own_task_group", [False, True])
def test_where_a_later_turn_failed_is_known(run: Any, environment: Any, engine: Any, own_task_group: bool) -> None:
    async def hold(task: Task, conversation: Conversation) -> None:
        await conversation.ask(task.messages)
        if member(conversation) == 0:
            engine.error = InfrastructureError("gone")
            if own_task_group:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(conversation.ask(task.messages))
            await conversation.ask(task.messages)

    environment.hold = hold
    group = run(size=2)
    assert [(f.rollout_id, f.where, f.error) for f in group.failures] == [("12.0", "engine", "engine http://e: gone")]
    assert [rollout.rollout_id for rollout in group.rollouts] == ["12.1"]


@pytest.mark.parametrize("own_task_group", [False, True])
def test_without_room_a_rollout_ends_and_is_scored(run: Any, environment: Any, own_task_group: bool) -> None:
    async def talk(task: Task, conversation: Conversation) -> None:
        while True:
            try:
                await conversation.ask(task.messages)
            except Exception as error:
                raise AssertionError("an environment saw the end of the conversation") from error

    async def talk_in_a_task(task: Task, conversation: Conversation) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(talk(task, conversation))

    environment.hold = talk_in_a_task if own_task_group else talk
    group = run(size=3)
    assert group.failures == ()
    assert all(rollout.truncated and len(rollout.tokens) <= 32 for rollout in group.rollouts)
    assert all(len(rollout.turns) > 1 for rollout in group.rollouts)


async def never_asks(task: Task, conversation: Conversation) -> None:
    """Ends at once."""


async def cancels_itself(task: Task, conversation: Conversation) -> None:
    await conversation.ask(task.messages)
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("hold", "sentence"), [(never_asks, "before the policy was asked"), (cancels_itself, "cancelled its own rollout")]
)
def test_environments_that_give_up(run: Any, environment: Any, hold: Any, sentence: str) -> None:
    environment.hold = hold
    group = run(size=2)
    assert group.rollouts == ()
    assert [failure.where for failure in group.failures] == ["environment"] * 2
    assert all(sentence in failure.error for failure in group.failures)


async def raises(task: Task, conversations: Sequence[Conversation]) -> list[Score]:
    raise UserError("row 3 has no answer")


async def too_few(task: Task, conversations: Sequence[Conversation]) -> list[Score]:
    return [Score(reward=1.0)]


@pytest.mark.parametrize(
    ("judge", "sentence"),
    [(raises, "row 3 has no answer"), (too_few, "score returned 1 scores for 3 conversations")],
)
def test_a_scorer_that_breaks_is_no_reward(run: Any, environment: Any, judge: Any, sentence: str) -> None:
    environment.judge = judge
    group = run(size=3)
    assert group.rollouts == ()
    assert [(f.rollout_id, f.where, f.error) for f in group.failures] == [
        (f"12.{i}", "environment", sentence) for i in range(3)
    ]


def test_rewards_are_finite_plain_numbers(run: Any, environment: Any) -> None:
    async def judge(task: Task, conversations: Sequence[Conversation]) -> list[Score]:
        return [
            Score(reward=float("nan")),
            Score(reward=np.float32(0.5), metrics={"accuracy": True}),  # type: ignore[arg-type]
            Score(reward=1.0, metrics={"depth": float("inf")}),
        ]

    environment.judge = judge
    group = run(size=3)
    (rollout,) = group.rollouts
    assert (rollout.rollout_id, rollout.reward, rollout.metrics) == ("12.1", 0.5, {"accuracy": 1.0})
    assert type(rollout.reward) is type(rollout.metrics["accuracy"]) is float
    assert [(f.rollout_id, f.error) for f in group.failures] == [
        ("12.0", "the environment scored reward = nan; it must be a finite number"),
        ("12.2", "the environment scored depth = inf; it must be a finite number"),
    ]


def test_cancelling_ends_everything_below(composition: Any, environment: Any, engine: Any) -> None:
    cleaned: list[str] = []

    async def hold(task: Task, conversation: Conversation) -> None:
        try:
            await conversation.ask(task.messages)
        finally:
            cleaned.append(conversation.rollout_id)

    async def scenario() -> set[str]:
        engine.gate.clear()
        before = asyncio.all_tasks()
        running = asyncio.create_task(runner_of(composition).run(request()))
        await engine.arrived.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return {task.get_name() for task in asyncio.all_tasks() - before}

    environment.hold = hold
    assert asyncio.run(scenario()) == set()
    assert sorted(cleaned) == ["12.0", "12.1", "12.2", "12.3"]
    assert engine.aborted == 1


def test_groups_run_side_by_side(composition: Any, engine: Any) -> None:
    async def scenario() -> list[Group]:
        runner = runner_of(composition)
        engine.gate.clear()
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(runner.run(request(ref(index)))) for index in range(3)]
            while len(engine.asked) < 3:
                await asyncio.sleep(0)
            engine.gate.set()
        return [task.result() for task in running]

    groups = asyncio.run(scenario())
    assert [group.task.index for group in groups] == [0, 1, 2]
    assert [group.rollouts[0].messages[0]["content"] for group in groups] == ["train0", "train1", "train2"]
    assert [asked.n for asked in engine.asked] == [4, 4, 4]


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (ref(environment="light"), "no environment 'light' in this process; it has 'fake'"),
        (ref(4), "'fake' has 4 train tasks, none with index 4"),
        (ref(2, split="eval"), "'fake' has 2 eval tasks, none with index 2"),
    ],
)
def test_tasks_that_do_not_exist(run: Any, task: TaskRef, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        run(task)


def test_what_is_built(composition: Any, environment: Any) -> None:
    assert environment_names(composition, cheap=False) == ("fake",)
    assert environment_names(composition, cheap=True) == ("light",)
    assert runner_of(composition).sizes() == {"fake/train": 4, "fake/eval": 2}
    assert environment.seed == 5
    assert set(runner_of(composition, "light").sizes()) == {"light/train", "light/eval"}


def test_closing_closes_environments_and_clients(composition: Any, environment: Any, engine: Any) -> None:
    async def scenario() -> None:
        runner = runner_of(composition)
        await runner.run(request())
        await runner.aclose()

    asyncio.run(scenario())
    assert environment.closed
    assert engine.closed


def test_closing_goes_on_when_an_environment_fails_to(composition: Any, environment: Any, engine: Any) -> None:
    @attrs.define(eq=False)
    class Stuck(type(environment)):  # type: ignore[misc]
        async def aclose(self) -> None:
            raise OSError("busy")

    composition.parts["fake:build"] = lambda section, seed: Stuck()

    async def scenario() -> None:
        runner = runner_of(composition)
        await runner.run(request())
        await runner.aclose()

    with pytest.raises(OSError, match="busy"):
        asyncio.run(scenario())
    assert engine.closed


# --- demonstrations ---------------------------------------------------------------------------------------------------
def test_demonstrations_weigh_what_the_assistant_says(composition: Any) -> None:
    first, second = asyncio.run(runner_of(composition).demonstrate([ref(0), ref(1, split="eval")]))
    prompt = [USER, *map(ord, "train0"), END, ASSISTANT]
    assert first.tokens.tolist() == [*prompt, *map(ord, "ab"), END]
    assert set(first.weights) == {"ce"}
    assert first.weights["ce"].tolist() == [0.0] * len(prompt) + [1.0, 1.0, 1.0]
    assert not first.sampled.any()
    assert set(first.versions.tolist()) == {-1}
    assert not first.engine_logprobs.any()
    assert not first.advantages.any()
    assert first.temperature == 1.0
    columns = (
        first.tokens,
        first.sampled,
        first.engine_logprobs,
        first.versions,
        first.advantages,
        first.weights["ce"],
    )
    assert [column.dtype for column in columns] == [np.int32, np.bool_, np.float32, np.int32, np.float32, np.float32]
    assert {len(column) for column in columns} == {len(first)}
    assert second.tokens.tolist()[1:6] == [*map(ord, "eval1")]


@pytest.mark.parametrize(
    ("solution", "sentence"),
    [
        (None, "environment 'fake' has no demonstration of train task 1, which the warm-up needs"),
        ("x" * 40, "takes 50 tokens, more than rollouts.sequence_length = 32"),
    ],
)
def test_demonstrations_that_cannot_be_used(
    composition: Any, environment: Any, solution: str | None, sentence: str
) -> None:
    environment.solution = solution
    with pytest.raises(UserError, match=sentence):
        asyncio.run(runner_of(composition).demonstrate([ref()]))


# --- a real multi-turn environment, a real chat format ----------------------------------------------------------------
class BinarySearch:
    """A policy that reads the hints off its prompt and answers with the middle of what is left."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.requests = 0

    def __call__(self, prompt: Sequence[int], sampling: Sampling) -> Completion:
        low, high = 0, 14
        for hint in re.findall("higher|lower", self.tokenizer.decode(prompt)):
            middle = (low + high) // 2
            low, high = (middle + 1, high) if hint == "higher" else (low, middle - 1)
        self.requests += 1
        tokens = as_tokens([*self.tokenizer.encode(str((low + high) // 2)), self.tokenizer.special(chatml.END)])
        return Completion(
            tokens=tokens,
            logprobs=np.full(len(tokens), -0.5, dtype=np.float32),
            versions=np.full(len(tokens), self.requests, dtype=np.int32),
            stop=StopReason.STOP,
        )


@pytest.fixture
def guessing(composition: Any, engine: Any) -> Any:
    """The composition with the guessing environment, ChatML over characters, and a policy that searches."""
    section = TokenizerSection(characters="abcdefghijklmnopqrstuvwxyz0123456789 \n")
    specials = (chatml.START, chatml.END)
    engine.reply = BinarySearch(load(section, specials))
    composition.parts["fake:build"] = lambda config, seed: build_guessing(GuessingConfig(), seed)
    composition.parts["m:render"] = lambda config, tokenizer: chatml.ChatMLRenderer(tokenizer)
    composition.providers[ModelConfig] = attrs.evolve(composition.providers[ModelConfig], special_tokens=specials)
    composition.run.tokenizer = section
    composition.run.rollouts = attrs.evolve(composition.run.rollouts, sequence_length=256)
    return composition


def test_guessing_extends_the_tokens_of_earlier_turns(guessing: Any, engine: Any) -> None:
    group = asyncio.run(runner_of(guessing).run(request(ref(7), size=2)))
    assert [rollout.metrics["accuracy"] for rollout in group.rollouts] == [1.0, 1.0]
    assert [asked.n for asked in engine.asked] == [2, 1, 1, 1, 1, 1, 1]
    for rollout in group.rollouts:
        said = [m["content"] for m in rollout.messages if m["role"] == "assistant"]
        assert said == ["7", "11", "9", "8"]
        own = [asked.prompt for asked in engine.asked if asked.session in ("", rollout.rollout_id)]
        assert [tuple(rollout.tokens[: turn.start].tolist()) for turn in rollout.turns] == own
        assert rollout.sampled_count == sum(len(text) + 1 for text in said)
        assert (np.diff(rollout.versions[rollout.sampled]) >= 0).all()
        assert (rollout.versions[~rollout.sampled] == -1).all()
        assert set(rollout.logprobs[rollout.sampled].tolist()) == {-0.5}


def test_a_rollout_reads_like_its_demonstration(guessing: Any, engine: Any) -> None:
    """Token for token: what the warm-up teaches is what rl samples, and the same tokens count."""

    async def scenario() -> tuple[Group, tuple[Sample, ...]]:
        runner = runner_of(guessing)
        return await runner.run(request(ref(7), size=1)), await runner.demonstrate([ref(7)])

    group, (sample,) = asyncio.run(scenario())
    assert group.rollouts[0].tokens.tolist() == sample.tokens.tolist()
    assert group.rollouts[0].sampled.tolist() == (sample.weights["ce"] == 1.0).tolist()
