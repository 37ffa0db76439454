"""Engines as the controller sees them: choice, load, health."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import attrs
import pytest
from prl.dispatch.change import Change
from prl.dispatch.engines import Attempt, Engine, EnginePool
from prl.ledger.writer import Ledger

from tests.dispatch.fakes import FakeEngine


@attrs.define(eq=False)
class Busy(FakeEngine):
    """Reports `busy_seconds`; the clock it shares with the pool moves by hand."""

    busy_seconds: float = 0.0

    async def statistics(self) -> Mapping[str, float]:
        return {**await super().statistics(), "busy_seconds": self.busy_seconds}


@attrs.define
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def pool(*clients: FakeEngine, clock: Clock | None = None) -> EnginePool:
    engines = [Engine(index=i, url=f"engine-{i}", client=client, serving=True) for i, client in enumerate(clients)]
    return EnginePool(engines, Change(), Ledger(Path("unwritten")), clock=clock or Clock())


def attempt(size: int) -> Attempt:
    return Attempt(size=size, deadline=asyncio.timeout(None))


def watched(engines: EnginePool, scene: Callable[[], Awaitable[None]]) -> None:
    async def body() -> None:
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            loop = tasks.create_task(engines.watch())
            await scene()
            loop.cancel()

    asyncio.run(body())


def test_groups_go_to_the_engine_with_the_fewest_rollouts():
    async def body() -> None:
        engines = pool(FakeEngine(), FakeEngine())
        engines.engines[0].attempts |= {attempt(4), attempt(4)}
        engines.engines[1].attempts |= {attempt(7)}
        assert (await engines.choose()).index == 1
        engines.engines[1].attempts |= {attempt(1)}
        assert (await engines.choose()).index == 0

    asyncio.run(body())


def test_engines_for_prompts_are_given_no_groups():
    async def body() -> None:
        engines = pool(FakeEngine(), FakeEngine())
        engines.engines[0].kind = "prefill"
        engines.engines[1].attempts |= {attempt(4)}
        assert (await engines.choose()).index == 1
        engines.engines[1].attempts.clear()
        engines.evict(engines.engines[1], "broken")
        assert (engines.serving, engines.sampling) == ([engines.engines[0]], [])

    asyncio.run(body())


def test_choosing_waits_until_an_engine_serves():
    async def body() -> None:
        engines = pool(FakeEngine())
        engines.evict(engines.engines[0], "broken")
        async with asyncio.TaskGroup() as tasks:
            choosing = tasks.create_task(engines.choose())
            await asyncio.sleep(0)
            assert not choosing.done()
            engines.rejoin(engines.engines[0])
        assert choosing.result().index == 0

    asyncio.run(body())


def test_an_engine_without_an_answer_is_evicted():
    engines = pool(FakeEngine(broken={"statistics"}), FakeEngine())

    async def scene() -> None:
        engines.poll()
        await engines.change.until(lambda: len(engines.serving) == 1)

    watched(engines, scene)
    assert [engine.index for engine in engines.serving] == [1]


def test_engines_for_prompts_are_watched_and_told_to_nobody():
    engines = pool(Busy(busy_seconds=1.0), Busy(busy_seconds=2.0))
    engines.engines[0].kind = "prefill"
    told: list[list[int]] = []

    async def body() -> None:
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            hear = lambda loads: told.append([load.engine for load in loads])  # noqa: E731
            loop = tasks.create_task(engines.watch(hear))
            engines.poll()
            while not told:
                await asyncio.sleep(0)
            loop.cancel()

    asyncio.run(body())
    assert told == [[1]]
    assert [engine.client.calls for engine in engines.engines] == [["statistics"], ["statistics"]]


def test_idle_is_the_share_of_time_in_which_engines_computed_nothing():
    clock, first, second = Clock(), Busy(busy_seconds=5.0), Busy(busy_seconds=0.0)
    engines = pool(first, second, clock=clock)

    async def poll() -> None:
        reports = len(first.calls)
        engines.poll()
        while len(first.calls) == reports or len(second.calls) == reports:
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def scene() -> None:
        await poll()
        assert engines.idle is None
        clock.now, first.busy_seconds, second.busy_seconds = 110.0, 13.0, 1.0
        await poll()
        assert engines.idle == pytest.approx(1 - (0.8 + 0.1) / 2)
        engines.evict(engines.engines[1], "broken")
        assert engines.idle == pytest.approx(0.2)

    watched(engines, scene)


def test_a_cut_ends_an_attempt_once_and_keeps_the_first_reason():
    async def body() -> str:
        trial = attempt(2)
        async with asyncio.timeout(20):
            with pytest.raises(TimeoutError):
                await run(trial)
        trial.cut("too late")
        return trial.cut_reason

    async def run(trial: Attempt) -> None:
        async with trial.deadline:
            trial.cut("stale")
            trial.cut("engine")
            await asyncio.Event().wait()

    assert asyncio.run(body()) == "stale"
