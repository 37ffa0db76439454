"""Which runner a task goes to."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import attrs
import pytest
from prl.dispatch.environments import EnvironmentPool, Place
from prl.dispatch.hub import DisconnectedError
from prl.messages import RunGroup
from prl.types import Group, Sample, Sampling, TaskRef

from tests.dispatch.fakes import answer, demonstration


@attrs.define(eq=False)
class FakeRunner:
    """Answers when `gate` is open."""

    gone: bool = False
    asked: list[RunGroup] = attrs.field(factory=list)
    demonstrated: list[TaskRef] = attrs.field(factory=list)
    gate: asyncio.Event = attrs.field(factory=asyncio.Event)

    async def run(self, request: RunGroup) -> Group:
        if self.gone:
            raise DisconnectedError("worker environment-0 is not connected")
        self.asked.append(request)
        await self.gate.wait()
        return answer(request)

    async def demonstrate(self, tasks: Sequence[TaskRef]) -> tuple[Sample, ...]:
        self.demonstrated += tasks
        await asyncio.sleep(0)
        return tuple(demonstration(task.index) for task in tasks)


def task(environment: str, index: int = 0) -> TaskRef:
    return TaskRef(environment=environment, split="train", index=index)


def request(environment: str) -> RunGroup:
    return RunGroup(
        request=0, group_id=0, task=task(environment), attempt=0, size=2, sampling=Sampling(), engine="", version=0
    )


def pool(*places: tuple[FakeRunner, str]) -> EnvironmentPool:
    named = enumerate(places)
    return EnvironmentPool(
        (Place(name=f"place-{i}", runner=runner, environments=frozenset(names)) for i, (runner, names) in named),
        on_run=lambda request, name: None,
    )


def test_groups_go_where_least_is_going_on():
    async def body() -> None:
        first, second = FakeRunner(), FakeRunner()
        environments = pool((first, "a"), (second, "a"))
        async with asyncio.TaskGroup() as tasks:
            for _ in range(5):
                tasks.create_task(environments.run(request("a")))
            for _ in range(5):
                await asyncio.sleep(0)
            assert (len(first.asked), len(second.asked)) == (3, 2)
            first.gate.set()
            second.gate.set()

    asyncio.run(body())


def test_a_task_goes_to_a_runner_that_has_its_environment():
    async def body() -> None:
        first, second = FakeRunner(), FakeRunner()
        second.gate.set()
        environments = pool((first, "a"), (second, "b"))
        for _ in range(3):
            await environments.run(request("b"))
        assert (len(first.asked), len(second.asked)) == (0, 3)

    asyncio.run(body())


def test_demonstrations_are_divided_and_none_is_lost():
    async def body() -> None:
        first, second, third = FakeRunner(), FakeRunner(), FakeRunner()
        environments = pool((first, "a"), (second, "a"), (third, "b"))
        tasks = [task("a", n) for n in range(5)] + [task("b", n) for n in range(5, 8)]
        samples = await environments.demonstrate(tasks)
        assert sorted(int(sample.tokens[0]) for sample in samples) == list(range(8))
        assert sorted(len(runner.demonstrated) for runner in (first, second)) == [2, 3]
        assert [ref.index for ref in third.demonstrated] == [5, 6, 7]

    asyncio.run(body())


def test_a_runner_that_is_gone_is_left_out_until_its_successor_joins():
    async def body() -> None:
        gone, there = FakeRunner(gone=True), FakeRunner()
        there.gate.set()
        environments = pool((gone, "a"), (there, "a"))
        with pytest.raises(DisconnectedError):
            await environments.run(request("a"))
        await environments.run(request("a"))
        assert len(there.asked) == 1
        there.gone = True
        with pytest.raises(DisconnectedError):
            await environments.run(request("a"))
        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(environments.run(request("a")))
            await asyncio.sleep(0)
            assert not waiting.done()
            successor = FakeRunner()
            successor.gate.set()
            environments.join(Place(name="place-1", runner=successor, environments=frozenset("a")))
        assert waiting.result().group_id == 0
        assert len(successor.asked) == 1

    asyncio.run(body())
