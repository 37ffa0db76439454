"""Routes on their way through an environment worker: asked for turn by turn, checked, stored once."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from prl.columns import ColumnFolder
from prl.compose.config import EngineConfig, ModelConfig
from prl.compose.routing import Routing
from prl.dispatch.verify import verify_group
from prl.messages import RunGroup
from prl.rollout.conversation import Conversation
from prl.rollout.runner import GroupRunner
from prl.routes import EXPERTS, VERSIONS
from prl.types import Completion, Group, Routes, Sampling, Split, Task, TaskRef

ROUTING = Routing(layers=("layers.1", "layers.4"), experts=8, experts_per_token=2)
SIZE, VERSION = 3, 3


def with_routes(prompt: Sequence[int], completion: Completion, first_row: int, **changes: Any) -> Completion:
    """What an engine with routers in every layer says: a token's experts follow from the token and its place."""
    tokens = np.array([*prompt, *completion.tokens.tolist()])[:-1]
    first = (tokens + np.arange(len(tokens)))[:, None] + np.arange(5)
    experts = (np.stack((first, first + 3), -1) % 8).astype(np.uint8)[first_row:]
    routes = Routes(
        layers=tuple(f"layers.{i}" for i in range(5)),
        experts=experts,
        versions=np.full(len(experts), VERSION, np.int32),
        start=first_row,
    )
    return attrs.evolve(completion, routes=attrs.evolve(routes, **changes))


@pytest.fixture
def routed(composition: Any, engine: Any, tmp_path: Path) -> Any:
    """Run a group of a run that replays routes; its engine says them from where it is asked."""
    model, served = composition.providers[ModelConfig], composition.providers[EngineConfig]
    composition.providers[ModelConfig] = attrs.evolve(model, routing="m:routing")
    composition.providers[EngineConfig] = attrs.evolve(served, reports_routes=True)
    composition.parts["m:routing"] = lambda config: ROUTING
    plain = engine.reply

    def run(split: Split = "train", **changes: Any) -> Group:
        def reply(prompt: Sequence[int], sampling: Sampling) -> Completion:
            start = engine.asked[-1].routes_from
            completion = plain(prompt, sampling)
            return completion if start is None else with_routes(prompt, completion, start, **changes)

        engine.reply = reply
        runner = GroupRunner(composition, composition.run, "token", columns=tmp_path, environments=("fake",))
        return asyncio.run(runner.run(request(split)))

    return run


def request(split: Split = "train") -> RunGroup:
    return RunGroup(
        request=9,
        group_id=12,
        task=TaskRef(environment="fake", split=split, index=1),
        attempt=1,
        size=SIZE,
        sampling=Sampling(seed=100, max_tokens=8),
        engine="http://e",
        version=VERSION,
    )


async def two_turns(task: Task, conversation: Conversation) -> None:
    await conversation.ask(task.messages)
    await conversation.ask([{"role": "user", "content": "ab"}])


def test_two_turns_of_siblings_become_columns(routed: Any, engine: Any, environment: Any, tmp_path: Path) -> None:
    environment.hold = two_turns
    group = routed()
    verify_group(group, request(), VERSION, ROUTING)
    folder = ColumnFolder(tmp_path)
    for rollout in group.rollouts:
        experts, versions = (
            np.concatenate([folder.read(piece) for piece in rollout.large[name]]) for name in (EXPERTS, VERSIONS)
        )
        first = (rollout.tokens + np.arange(len(rollout.tokens)))[:, None] + np.array([1, 4])
        assert experts[:-1].tolist() == (np.stack((first, first + 3), -1) % 8)[:-1].tolist()
        assert versions.tolist() == [VERSION] * (len(versions) - 1) + [-1]
    later = [asked for asked in engine.asked if asked.session]
    ends = {rollout.turns[0].end - 1 for rollout in group.rollouts}
    assert {asked.routes_from for asked in later} == ends
    assert len({rollout.large[EXPERTS][0].file for rollout in group.rollouts}) == 1
    assert len(folder.files()) == 1 + SIZE


def test_evaluation_asks_for_no_routes(routed: Any, engine: Any, tmp_path: Path) -> None:
    group = routed("eval")
    assert [asked.routes_from for asked in engine.asked] == [None]
    assert [rollout.large for rollout in group.rollouts] == [{}] * SIZE
    assert ColumnFolder(tmp_path).files() == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": tuple("abcde")}, "layers.1, layers.4 are missing among the layers a, b, c, d, e"),
        ({"experts": np.zeros((2, 5, 2), np.uint8)}, r"shape \(2, 5, 2\)"),
        ({"start": 99}, "tokens 99 to"),
    ],
)
def test_routes_that_make_no_sense_fail_the_rollout_with_the_reason(routed: Any, changes: Any, sentence: str) -> None:
    group = routed(**changes)
    assert group.rollouts == ()
    assert {failure.where for failure in group.failures} == {"engine"}
    for failure in group.failures:
        assert re.search(f"^engine http://e: the engine's routes make no sense: .*{sentence}", failure.error)
