"""A group that is interrupted and gone on with: what was said is not sampled again, and the group is the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import attrs
import numpy as np
import pytest
from prl.compose.config import EngineConfig
from prl.errors import CheckpointError
from prl.messages import RunGroup
from prl.rollout import carried
from prl.rollout.conversation import Conversation
from prl.rollout.runner import GroupRunner
from prl.types import Carried, Completion, Group, Sampling, StopReason, Task, TaskRef, as_tokens

END, ASSISTANT = 0, 1
SEED, STRIDE, SEEDS = 100, 0x9E3779B97F4A7C15, 1 << 63
SIZE, VERSION = 4, 3
REQUEST = RunGroup(
    request=9,
    group_id=12,
    task=TaskRef(environment="fake", split="train", index=1),
    attempt=1,
    size=SIZE,
    sampling=Sampling(seed=SEED, max_tokens=8),
    engine="http://e",
    version=VERSION,
)
Asked = tuple[int, int]
"""(member, turn)"""
LATER: Mapping[Asked, int] = {(2, 1): 0, (3, 1): 1, (1, 2): 2}
"""Turns that stay unfinished, with so many tokens: member 0 comes to its end."""
FIRST: Mapping[Asked, int] = {(0, 0): 99, (1, 0): 3, (2, 0): 0, (3, 0): 1}
"""No member's first turn is answered: one request of four, of which the first is finished."""


@attrs.define(eq=False)
class PlaceEngine:
    """Draws a token by seed and place alone; a request is answered when all of its members are."""

    version: int = VERSION
    holding: Mapping[Asked, int] = attrs.field(factory=dict)
    asked: dict[Asked, int] = attrs.field(factory=dict)
    """What was asked for -> tokens of the prompt."""
    _so_far: dict[str, list[Completion]] = attrs.field(factory=dict)
    _change: asyncio.Condition = attrs.field(factory=asyncio.Condition)

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, *, n: int = 1, request_id: str = "", **options: Any
    ) -> list[Completion]:
        turn = list(prompt).count(ASSISTANT) - 1
        members = [(sampling.seed + i - SEED - STRIDE * turn) % SEEDS for i in range(n)]
        self.asked |= {(member, turn): len(prompt) for member in members}
        whole = [self._sample(sampling.seed + i, len(prompt), sampling.max_tokens) for i in range(n)]
        if any((member, turn) in self.holding for member in members):
            async with self._change:
                self._so_far[request_id or str(len(self._so_far))] = [
                    cut(c, self.holding[member, turn]) for c, member in zip(whole, members, strict=True)
                ]
                self._change.notify_all()
            await asyncio.Event().wait()
        return whole

    async def so_far(self, request_id: str) -> list[Completion]:
        return self._so_far.get(request_id, [])

    async def all_held(self) -> None:
        async with self._change:
            await self._change.wait_for(lambda: sum(map(len, self._so_far.values())) == len(self.holding))

    def _sample(self, seed: int, place: int, most: int) -> Completion:
        tokens: list[int] = []
        while len(tokens) < most and END not in tokens:
            draw = Random(f"{seed} {place + len(tokens)}")
            tokens.append(END if draw.random() < 0.15 else ord(draw.choice("abcdef")))
        return Completion(
            tokens=as_tokens(tokens),
            logprobs=-np.arange(place, place + len(tokens), dtype=np.float32),
            versions=np.full(len(tokens), self.version, np.int32),
            stop=StopReason.STOP if tokens[-1] == END else StopReason.LENGTH,
        )

    async def aclose(self) -> None:
        """Nothing is open."""


def cut(completion: Completion, count: int) -> Completion:
    if count >= len(completion.tokens):
        return completion
    columns = {name: getattr(completion, name)[:count] for name in ("tokens", "logprobs", "versions")}
    return attrs.evolve(completion, stop=StopReason.ABORT, **columns)


async def three_turns(task: Task, conversation: Conversation) -> None:
    await conversation.ask(task.messages)
    for said in ("b", "c"):
        reply = await conversation.ask([{"role": "user", "content": said}])
        conversation.state["heard"] = (conversation.state.get("heard", ""), reply["content"])


@pytest.fixture
def runner(composition: Any, environment: Any) -> Callable[..., GroupRunner]:
    """A runner whose engine is the given one."""
    engine = composition.providers[EngineConfig]
    composition.run.rollouts = attrs.evolve(composition.run.rollouts, sequence_length=200)
    environment.hold = three_turns

    def runner(engine_: PlaceEngine, *, resumable: bool = True) -> GroupRunner:
        composition.providers[EngineConfig] = attrs.evolve(engine, resumable=resumable)
        composition.parts["e:connect"] = lambda url, token: engine_
        return GroupRunner(composition, composition.run, "token", columns=Path("nowhere"), environments=("fake",))

    return runner


def interrupted(runner: GroupRunner, engine: PlaceEngine, path: Path, *, version: int = VERSION) -> tuple[Carried, ...]:
    """Run the group until nothing goes on, keep what is finished, and end it."""

    async def scene() -> tuple[Carried, ...]:
        async with asyncio.timeout(20):
            running = asyncio.ensure_future(runner.run(REQUEST))
            await engine.all_held()
            kept = await runner.keep_in_flight(path, version)
            running.cancel()
            await asyncio.wait([running])
            assert await runner.keep_in_flight(path, version) == ()
            return kept

    return asyncio.run(scene())


def columns(group: Group) -> list[Any]:
    """All that was sampled but its versions."""
    return [
        (r.rollout_id, r.tokens.tolist(), r.sampled.tolist(), r.logprobs.tolist(), r.turns, r.messages, r.reward)
        for r in group.rollouts
    ]


@pytest.mark.parametrize("holding", [LATER, FIRST])
def test_only_what_is_missing_is_sampled_and_the_group_is_the_same(runner: Any, tmp_path: Path, holding: Any) -> None:
    whole = asyncio.run(runner(PlaceEngine()).run(REQUEST))
    first = PlaceEngine(holding=holding)
    (kept,) = interrupted(runner(first), first, tmp_path / "in-flight" / "place")
    assert (kept.group_id, kept.attempt, kept.oldest_version) == (12, 1, VERSION)
    second = PlaceEngine(version=VERSION + 1)
    group = asyncio.run(runner(second).run(attrs.evolve(REQUEST, carried=kept)))
    assert columns(group) == columns(whole)
    for (member, turn), had in holding.items():
        start, end = whole.rollouts[member].turns[turn].start, whole.rollouts[member].turns[turn].end
        assert second.asked.pop((member, turn), end) == min(start + had, end)
        versions = group.rollouts[member].versions[start:end].tolist()
        assert versions == [VERSION] * min(had, end - start) + [VERSION + 1] * (end - start - had)
    unfinished = dict(holding)
    assert all(any(member == m and turn > t for m, t in unfinished) for member, turn in second.asked)


def test_a_turn_is_not_gone_on_with_by_an_engine_that_draws_by_the_order_of_tokens(runner: Any, tmp_path: Path) -> None:
    first = PlaceEngine(holding=LATER)
    (kept,) = interrupted(runner(first, resumable=False), first, tmp_path / "place")
    second = PlaceEngine()
    group = asyncio.run(runner(second, resumable=False).run(attrs.evolve(REQUEST, carried=kept)))
    assert columns(group) == columns(asyncio.run(runner(PlaceEngine()).run(REQUEST)))
    assert set(second.asked) == {(2, 1), (2, 2), (3, 1), (3, 2), (1, 2)}
    starts = {(m, t): group.rollouts[m].turns[t].start for m, t in second.asked}
    assert second.asked == starts


def test_what_a_later_version_sampled_is_not_kept(runner: Any, tmp_path: Path) -> None:
    first = PlaceEngine(holding=FIRST, version=VERSION + 1)
    assert interrupted(runner(first), first, tmp_path / "place") == ()
    assert not (tmp_path / "place").exists()


@pytest.mark.parametrize("change", ["sampling", "file", "environment"])
def test_a_record_that_does_not_fit_is_left_alone(runner: Any, environment: Any, tmp_path: Path, change: str) -> None:
    first = PlaceEngine(holding=LATER)
    (kept,) = interrupted(runner(first), first, tmp_path / "place")
    request = attrs.evolve(REQUEST, carried=kept)
    if change == "sampling":
        request = attrs.evolve(request, sampling=attrs.evolve(request.sampling, temperature=0.5))
    if change == "file":
        (tmp_path / "place").unlink()
    if change == "environment":

        async def otherwise(task: Task, conversation: Conversation) -> None:
            await conversation.ask([{"role": "user", "content": "something else"}])
            await conversation.ask([{"role": "user", "content": "b"}])

        environment.hold = otherwise
    again = PlaceEngine(version=VERSION + 1)
    group = asyncio.run(runner(again).run(request))
    fresh = asyncio.run(runner(PlaceEngine(version=VERSION + 1)).run(attrs.evolve(request, carried=None)))
    assert columns(group) == columns(fresh)
    assert {(member, 0) for member in range(SIZE)} <= set(again.asked)
    assert {int(v) for r in group.rollouts for v in r.versions[r.sampled]} == {VERSION + 1}


def test_an_environment_that_goes_another_way_later_keeps_the_turns_before(
    runner: Any, environment: Any, tmp_path: Path
) -> None:
    async def otherwise(task: Task, conversation: Conversation) -> None:
        await conversation.ask(task.messages)
        await conversation.ask([{"role": "user", "content": "another"}])

    first = PlaceEngine(holding=LATER)
    (kept,) = interrupted(runner(first), first, tmp_path / "place")
    environment.hold = otherwise
    second = PlaceEngine()
    group = asyncio.run(runner(second).run(attrs.evolve(REQUEST, carried=kept)))
    assert set(second.asked) == {(member, 1) for member in range(SIZE)}
    assert columns(group) == columns(asyncio.run(runner(PlaceEngine()).run(REQUEST)))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "place").write_bytes(b"\x01" + b"\0" * 7 + b"\x03" + b"\0" * 7 + b"abc")
    entry = Carried(group_id=7, attempt=0, oldest_version=0, file=str(tmp_path / "place"), offset=0, nbytes=19)
    with pytest.raises(CheckpointError, match="has nothing of group 7 at byte 0: malformed message"):
        carried.read(entry)
