"""Publication: prepare, commit, acknowledge, retire; and what becomes of an engine that fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import attrs
import pytest
from prl.dispatch.change import Change
from prl.dispatch.controller import root_cause
from prl.dispatch.engines import Attempt, Engine, EnginePool
from prl.errors import RunError
from prl.ledger.writer import Ledger
from prl.weights.publish import Publisher

from tests.dispatch.fakes import FakeEngine, manifest


@attrs.define(eq=False)
class Stage:
    """A publisher, its engines, and a record of what it told the others."""

    engines: list[FakeEngine]
    deadline: float = 5.0
    served: list[int] = attrs.field(factory=list)
    retired: list[int] = attrs.field(factory=list)
    condemned: list[int] = attrs.field(factory=list)
    change: Change = attrs.field(factory=Change)
    pool: EnginePool = attrs.field(init=False)
    publisher: Publisher = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        engines = [Engine(index=i, url=f"engine-{i}", client=client) for i, client in enumerate(self.engines)]
        self.pool = EnginePool(engines, self.change, Ledger(Path("unwritten")))
        self.publisher = Publisher(
            self.pool,
            change=self.change,
            patience=lambda nbytes: self.deadline,
            on_served=lambda version, seconds: self.served.append(version),
            retire=self._retire,
            condemn=lambda index, reason: self.condemned.append(index),
            pause=0.0,
        )

    async def _retire(self, version: int) -> None:
        self.retired.append(version)
        self.change.notify()

    async def until(self, ready: Callable[[], bool]) -> None:
        await asyncio.wait_for(self.change.until(ready), 10)

    async def until_served(self, version: int) -> None:
        await self.until(lambda: self.publisher.served >= version)


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


def play(stage: Callable[[], Stage], scene: Callable[[Stage], Awaitable[None]]) -> Stage:
    """Load version 0, then run the scene while the keepers work."""

    async def body() -> Stage:
        built = stage()
        await built.publisher.first(manifest(0))
        async with asyncio.TaskGroup() as tasks:
            keepers = tasks.create_task(built.publisher.run())
            await scene(built)
            keepers.cancel()
        return built

    return asyncio.run(body())


def test_every_engine_prepares_and_commits_before_a_version_is_served():
    async def scene(stage: Stage) -> None:
        stage.publisher.announce(manifest(1))
        await stage.until_served(1)

    stage = play(lambda: Stage([FakeEngine(), FakeEngine()]), scene)
    assert stage.served == [0, 1]
    assert stage.retired == [0]
    for engine in stage.engines:
        assert (engine.prepared, engine.committed) == ([0, 1], [0, 1])


def test_a_version_counts_as_served_when_the_last_engine_has_it():
    async def scene(stage: Stage) -> None:
        release = stage.engines[1].held["commit"] = asyncio.Event()
        stage.publisher.announce(manifest(1))
        await settle()
        assert [engine.version for engine in stage.pool.engines] == [1, 0]
        assert (stage.served, stage.retired) == ([0], [])
        release.set()
        await stage.until_served(1)

    assert play(lambda: Stage([FakeEngine(), FakeEngine()]), scene).retired == [0]


def test_versions_that_were_overtaken_are_skipped_and_retired():
    async def scene(stage: Stage) -> None:
        for version in (1, 2, 3):
            stage.publisher.announce(manifest(version))
        await stage.until_served(3)
        await stage.until(lambda: len(stage.retired) == 3)

    stage = play(lambda: Stage([FakeEngine()]), scene)
    assert stage.engines[0].committed == [0, 3]
    assert (stage.served, stage.retired) == ([0, 3], [0, 1, 2])


@pytest.mark.parametrize("call", ["prepare", "commit"])
def test_an_engine_that_fails_is_evicted_and_does_not_hold_up_the_others(call):
    async def scene(stage: Stage) -> None:
        stage.engines[1].broken.add(call)
        stage.publisher.announce(manifest(1))
        await stage.until_served(1)
        assert [engine.index for engine in stage.pool.serving] == [0]
        stage.engines[1].broken.clear()
        await stage.until(lambda: len(stage.pool.serving) == 2)

    stage = play(lambda: Stage([FakeEngine(), FakeEngine()]), scene)
    assert stage.engines[1].committed == [0, 1]
    assert stage.pool.engines[1].failures == 0


def test_what_runs_on_an_evicted_engine_is_cut():
    async def scene(stage: Stage) -> None:
        attempt = Attempt(size=4, deadline=asyncio.timeout(None))
        stage.pool.engines[0].attempts.add(attempt)
        stage.engines[0].broken.add("prepare")

        async def run() -> None:
            async with attempt.deadline:
                stage.publisher.announce(manifest(1))
                await asyncio.Event().wait()

        with pytest.raises(TimeoutError):
            await run()
        assert attempt.cut_reason == "engine"
        stage.engines[0].broken.clear()

    play(lambda: Stage([FakeEngine()]), scene)


def test_an_engine_that_takes_no_weights_is_condemned_once_while_others_serve():
    async def scene(stage: Stage) -> None:
        stage.engines[1].broken.add("commit")
        stage.publisher.announce(manifest(1))
        await stage.until_served(1)
        await stage.until(lambda: stage.pool.engines[1].failures > 6)

    stage = play(lambda: Stage([FakeEngine(), FakeEngine()]), scene)
    assert stage.condemned == [1]
    assert stage.pool.engines[1].version == 0


def test_nothing_is_tried_with_an_engine_that_is_gone_and_its_successor_is_caught_up():
    async def scene(stage: Stage) -> None:
        stage.pool.lose(1, "it was killed")
        for version in (1, 2):
            stage.publisher.announce(manifest(version))
            await stage.until_served(version)
        assert stage.engines[1].prepared == [0]
        successor = FakeEngine()
        stage.engines.append(successor)
        stage.pool.replace(1, "engine-2", successor)
        await stage.until(lambda: len(stage.pool.serving) == 2)

    stage = play(lambda: Stage([FakeEngine(), FakeEngine()]), scene)
    assert (stage.engines[1].committed, stage.engines[2].committed) == ([0], [2])
    assert (stage.pool.engines[1].url, stage.pool.engines[1].version) == ("engine-2", 2)


def test_weights_that_an_engine_took_with_it_do_not_count_for_its_successor():
    """It acknowledged, and died before that was taken note of."""

    async def scene(stage: Stage) -> None:
        stage.engines[1].held["commit"] = release = asyncio.Event()
        stage.publisher.announce(manifest(1))
        await stage.until(lambda: stage.engines[1].calls[-1] == "commit")
        successor = FakeEngine()
        stage.engines.append(successor)
        stage.pool.replace(1, "engine-2", successor)
        release.set()
        await stage.until(lambda: len(stage.pool.serving) == 2)
        assert successor.committed == [1]

    play(lambda: Stage([FakeEngine(), FakeEngine()]), scene)


def test_an_evicted_engine_is_caught_up_to_the_newest_version():
    async def scene(stage: Stage) -> None:
        stage.engines[1].broken.add("prepare")
        for version in (1, 2):
            stage.publisher.announce(manifest(version))
            await stage.until_served(version)
        stage.engines[1].broken.clear()
        await stage.until(lambda: len(stage.pool.serving) == 2)

    stage = play(lambda: Stage([FakeEngine(), FakeEngine()]), scene)
    assert stage.engines[1].committed == [0, 2]


def test_an_engine_evicted_by_others_commits_again_before_it_serves():
    async def scene(stage: Stage) -> None:
        stage.pool.evict(stage.pool.engines[0], "no statistics")
        assert stage.pool.serving == []
        await stage.until(lambda: len(stage.pool.serving) == 1)

    assert play(lambda: Stage([FakeEngine()]), scene).engines[0].committed == [0, 0]


def test_a_missed_deadline_is_a_failure():
    async def scene(stage: Stage) -> None:
        stage.engines[1].held["prepare"] = asyncio.Event()
        stage.publisher.announce(manifest(1))
        await stage.until_served(1)
        assert not stage.pool.engines[1].serving
        del stage.engines[1].held["prepare"]
        await stage.until(lambda: stage.pool.engines[1].serving)

    play(lambda: Stage([FakeEngine(), FakeEngine()], deadline=0.02), scene)


def test_without_any_engine_left_the_run_fails_after_three_catch_ups():
    async def scene(stage: Stage) -> None:
        stage.engines[0].broken.add("prepare")
        stage.engines[0].calls.clear()
        stage.publisher.announce(manifest(1))
        await asyncio.Event().wait()

    engine = FakeEngine()
    with pytest.raises(BaseExceptionGroup) as caught:
        play(lambda: Stage([engine]), scene)
    error = root_cause(caught.value)
    assert isinstance(error, RunError)
    assert "no engine is left: engine 0 (engine-0) failed 4 updates in a row" in str(error)
    assert "prepare is broken" in str(error)
    assert engine.calls == ["prepare"] * 4


def test_an_engine_that_cannot_load_the_first_weights_fails_the_run():
    with pytest.raises(ExceptionGroup) as caught:
        play(lambda: Stage([FakeEngine(), FakeEngine(broken={"commit"})]), lambda stage: asyncio.sleep(0))
    error = root_cause(caught.value)
    assert "engine 1 (engine-1) cannot load the first weights: commit is broken" in str(error)
