"""The dispatcher between a scheduler, a feed and a placement that the test plays."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
from prl.compose.config import RolloutSection
from prl.dispatch.change import Change
from prl.dispatch.controller import root_cause
from prl.dispatch.dispatcher import Dispatcher
from prl.dispatch.engines import Engine, EnginePool
from prl.dispatch.feed import Feed, Issue, Source
from prl.dispatch.placement import GroupLostError
from prl.dispatch.progress import Progress
from prl.errors import RunError
from prl.ledger.writer import Ledger
from prl.providers import Drop, InFlight, Pipeline
from prl.types import Carried, Group, Sampling

from tests.dispatch.fakes import FakeEngine, rollout


@attrs.define(eq=False)
class FakePlacement:
    """Groups end when the test says how."""

    running: dict[int, asyncio.Future[None]] = attrs.field(factory=dict)
    issued: list[Issue] = attrs.field(factory=list)
    cuts: list[tuple[int, str]] = attrs.field(factory=list)

    async def run(
        self, issue: Issue, *, size: int, sampling: Sampling, version: int, carried: Carried | None = None
    ) -> Group:
        self.issued.append(issue)
        end = self.running[issue.group_id] = asyncio.get_running_loop().create_future()
        await end
        return Group(
            group_id=issue.group_id,
            task=issue.task,
            attempt=issue.attempt,
            started_version=version,
            rollouts=(rollout(f"{issue.group_id}.0", version=version),),
        )

    def cut(self, group_id: int, reason: str) -> None:
        self.cuts.append((group_id, reason))
        self.lose(group_id, reason, cut=True)

    async def finish(self, *group_ids: int) -> None:
        for group_id in group_ids:
            self.running.pop(group_id).set_result(None)
        await settle()

    def lose(self, group_id: int, reason: str, *, cut: bool = False) -> None:
        self.running.pop(group_id).set_exception(GroupLostError(reason, f"lost to {reason}", cut=cut))


@attrs.define(eq=False)
class FakeScheduler:
    """`ahead` groups may be ready or running; `refused` are not admitted, `cut` are cut at the next publication."""

    ahead: int = 3
    refused: set[int] = attrs.field(factory=set)
    cut: list[Drop] = attrs.field(factory=list)
    seen: list[Pipeline] = attrs.field(factory=list)
    in_flight: list[InFlight] = attrs.field(factory=list)

    def capacity(self, pipeline: Pipeline) -> int:
        self.seen.append(pipeline)
        return self.ahead - pipeline.ready - pipeline.running

    def admit(self, group: Group, version: int) -> Drop | None:
        if group.group_id in self.refused and group.attempt == 0:
            return Drop(group_id=group.group_id, reason="dull")
        return None

    def select(self, ready: Sequence[int], outstanding: Sequence[int], count: int) -> Sequence[int]:
        return ready[:count]

    def on_publish(self, version: int, in_flight: Sequence[InFlight]) -> Sequence[Drop]:
        self.in_flight = list(in_flight)
        return self.cut

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert state == {}


@attrs.define(eq=False)
class Stage:
    dispatcher: Dispatcher
    placement: FakePlacement
    scheduler: FakeScheduler
    arrived: list[tuple[int, int]]

    @property
    def issued(self) -> list[tuple[int, int]]:
        return [(issue.group_id, issue.attempt) for issue in self.placement.issued]


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


def build(*, steps: int, retries: int) -> Stage:
    change, ledger = Change(), Ledger(Path("unwritten"))
    placement, scheduler, arrived = FakePlacement(), FakeScheduler(), []
    engine = Engine(index=0, url="engine-0", client=FakeEngine(), serving=True)
    dispatcher = Dispatcher(
        feed=Feed([Source(environment="toy", weight=1.0, size=100)], seed=0, retries=retries),
        scheduler=scheduler,
        placement=placement,
        engines=EnginePool([engine], change, ledger),
        ledger=ledger,
        progress=Progress(steps=steps, change=change),
        rollouts=RolloutSection(groups_per_step=2, group_size=1, retries=retries),
        most_lost=0.5,
        seed=0,
        clock=lambda: 5.0,
        on_group=lambda group, version: arrived.append((group.group_id, version)),
    )
    return Stage(dispatcher, placement, scheduler, arrived)


def play(scene: Callable[[Stage], Awaitable[None]], *, steps: int = 10, retries: int = 2) -> Stage:
    async def body() -> Stage:
        stage = build(steps=steps, retries=retries)
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            loop = tasks.create_task(stage.dispatcher.run())
            await settle()
            await scene(stage)
            loop.cancel()
        return stage

    return asyncio.run(body())


def test_groups_start_while_there_is_capacity():
    async def scene(stage: Stage) -> None:
        assert stage.issued == [(0, 0), (1, 0), (2, 0)]
        await stage.placement.finish(1)
        assert len(stage.issued) == 3  # it is ready: the scheduler counts it still
        await stage.placement.finish(0)
        assert [group.group_id for group in await stage.dispatcher.take()] == [0, 1]
        stage.dispatcher.progress.formed += 1
        stage.dispatcher.progress.change.notify()
        await settle()
        assert stage.issued[3:] == [(3, 0), (4, 0)]

    assert play(scene).arrived == [(1, 0), (0, 0)]


def test_nothing_starts_that_no_step_will_train():
    async def scene(stage: Stage) -> None:
        assert len(stage.issued) == 2
        await stage.placement.finish(0, 1)
        assert len(stage.issued) == 2

    play(scene, steps=1)


def test_nothing_starts_without_an_engine():
    async def scene(stage: Stage) -> None:
        (engine,) = stage.dispatcher.engines.engines
        stage.dispatcher.engines.evict(engine, "broken")
        stage.placement.lose(0, "engine", cut=True)
        await settle()
        assert len(stage.issued) == 3
        stage.dispatcher.engines.rejoin(engine)
        await settle()
        assert stage.issued[3:] == [(0, 1)]

    play(scene)


def test_what_is_lost_is_tried_again_and_counted():
    async def scene(stage: Stage) -> None:
        stage.placement.lose(1, "environment")
        await settle()
        assert stage.issued[3:] == [(1, 1)]
        stage.placement.lose(1, "timeout")
        await settle()
        stage.placement.lose(1, "timeout")
        await settle()
        assert stage.issued[4:] == [(1, 2), (3, 0)]
        assert stage.dispatcher.take_dropped() == {"environment": 1, "timeout": 2, "given_up": 1}
        assert stage.dispatcher.take_dropped() == {}

    play(scene)


def test_what_is_refused_on_arrival_is_tried_again():
    async def scene(stage: Stage) -> None:
        stage.scheduler.refused = {2}
        await stage.placement.finish(2)
        assert stage.issued[3:] == [(2, 1)]
        assert stage.dispatcher.take_dropped() == {"dull": 1}

    assert play(scene).arrived == [(2, 0)]


def test_what_is_refused_when_a_batch_is_formed_is_tried_again():
    """Nothing else happens at that moment: the loop must be woken by the refusal itself."""

    async def scene(stage: Stage) -> None:
        await stage.placement.finish(0, 1, 2)
        stage.scheduler.refused = {0, 1}
        taking = asyncio.ensure_future(stage.dispatcher.take())
        await settle()
        assert stage.issued[3:] == [(0, 1), (1, 1)]
        await stage.placement.finish(1)
        assert [group.group_id for group in await taking] == [1, 2]

    play(scene)


def test_a_publication_cuts_what_the_scheduler_names():
    async def scene(stage: Stage) -> None:
        stage.dispatcher.progress.served = 1
        stage.scheduler.cut = [
            Drop(group_id=0, reason="stale"),
            Drop(group_id=2, reason="hopeless", retry=False),
        ]
        stage.dispatcher.published(1)
        await settle()
        assert stage.placement.cuts == [(0, "stale"), (2, "hopeless")]
        assert stage.issued[3:] == [(0, 1), (3, 0)]
        assert stage.dispatcher.take_dropped() == {"stale": 1, "hopeless": 1}
        assert [(f.group_id, f.started_version, f.started_at) for f in stage.scheduler.in_flight] == [
            (n, 0, 5.0) for n in range(3)
        ]

    play(scene)


def test_the_scheduler_sees_the_pipeline_as_it_is():
    async def scene(stage: Stage) -> None:
        await stage.placement.finish(0)
        progress = stage.dispatcher.progress
        progress.served, progress.formed = 3, 4
        progress.change.notify()
        await settle()
        assert stage.scheduler.seen[-1] == Pipeline(version=3, next_version=4, ready=1, running=2, arrived=1)
        assert stage.dispatcher.running == 2

    play(scene)


def test_a_run_that_loses_everything_fails_but_cuts_do_not_count():
    async def scene(stage: Stage) -> None:
        for _ in range(40):
            stage.placement.lose(next(iter(stage.placement.running)), "engine", cut=True)
            await settle()
        for _ in range(40):
            stage.placement.lose(next(iter(stage.placement.running)), "environment")
            await settle()

    with pytest.raises(BaseExceptionGroup) as caught:
        play(scene)
    error = root_cause(caught.value)
    assert isinstance(error, RunError)
    assert str(error) == (
        "32 of the last 32 groups were lost to failures, more than failures.share = 0.5 allows; "
        "the last one because: lost to environment"
    )
