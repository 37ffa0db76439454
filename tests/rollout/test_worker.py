"""The environment process against the controller's real hub: what it answers, what it stops, how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from prl.dispatch.hub import Hub
from prl.errors import InfrastructureError, RunError, UserError
from prl.messages import Cancel, Demonstrate, Hello, Retire, RunGroup, Stop
from prl.rollout import worker
from prl.rollout.conversation import Conversation
from prl.run_dir import RunDir
from prl.types import Sampling, Task, TaskRef

PEER = b"environment-3"


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path)
    run_dir.create_token()
    return run_dir


@attrs.frozen(eq=False)
class Controller:
    """The hub and the worker it talks to."""

    hub: Hub
    worker: asyncio.Task[None]


@pytest.fixture
def controller(composition: Any, run_dir: RunDir) -> Callable[[], Any]:
    """`async with controller() as c`: a worker that has said Hello; it is stopped when the block is left."""

    @asynccontextmanager
    async def open_controller() -> AsyncIterator[Controller]:
        async with Hub(run_dir) as hub, asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(hub.serve())
            working = tasks.create_task(worker.work(composition, run_dir, 3))
            await hub.hello("environment", 3)
            yield Controller(hub, working)
            if not working.done():
                await hub.send(PEER, Stop())
            await working
            serving.cancel()

    return open_controller


def group(index: int = 0) -> RunGroup:
    return RunGroup(
        request=0,
        group_id=7,
        task=TaskRef(environment="fake", split="train", index=index),
        attempt=0,
        size=3,
        sampling=Sampling(seed=1, max_tokens=8),
        engine="http://e",
        version=2,
    )


def test_it_introduces_itself_with_its_sizes(controller: Any) -> None:
    async def scenario() -> Hello:
        async with controller() as c:
            peer, hello = await c.hub.hello("environment", 3)
            assert peer == PEER
            return hello

    hello = asyncio.run(scenario())
    assert (hello.role, hello.index) == ("environment", 3)
    assert hello.sizes == {"fake/train": 4, "fake/eval": 2}


def test_requests_are_answered_side_by_side(controller: Any, engine: Any) -> None:
    async def scenario() -> list[Any]:
        async with controller() as c:
            engine.gate.clear()
            asking = [asyncio.create_task(c.hub.request(PEER, group(index))) for index in range(3)]
            while len(engine.asked) < 3:
                await asyncio.sleep(0.001)
            engine.gate.set()
            return await asyncio.gather(*asking)

    answers = asyncio.run(scenario())
    assert [answer.group.task.index for answer in answers] == [0, 1, 2]
    assert all(len(answer.group.rollouts) == 3 for answer in answers)
    rollout = answers[1].group.rollouts[0]
    prompt = engine.asked[1].prompt
    assert rollout.tokens.tolist() == [*prompt, *engine.reply(prompt, Sampling(seed=1, max_tokens=8)).tokens.tolist()]
    assert rollout.messages[0] == {"role": "user", "content": "train1"}


def test_demonstrations_cross_the_wire(controller: Any) -> None:
    async def scenario() -> Any:
        async with controller() as c:
            tasks = tuple(TaskRef(environment="fake", split="train", index=index) for index in range(2))
            return await c.hub.request(PEER, Demonstrate(request=0, tasks=tasks))

    samples = asyncio.run(scenario()).samples
    assert [sample.weights["ce"].sum() for sample in samples] == [3.0, 3.0]


def test_a_request_that_fails_is_reported_and_the_worker_lives_on(controller: Any) -> None:
    async def scenario() -> Any:
        async with controller() as c:
            with pytest.raises(InfrastructureError, match=r"environment-3: .*'fake' has 4 train tasks, none"):
                await c.hub.request(PEER, group(99))
            return await c.hub.request(PEER, group(0))

    assert len(asyncio.run(scenario()).group.rollouts) == 3


def test_what_nobody_foresaw_is_reported_with_its_place(controller: Any, environment: Any) -> None:
    def task(split: str, index: int) -> Task:
        raise ZeroDivisionError("no task")

    async def scenario() -> None:
        async with controller() as c:
            environment.task = task
            with pytest.raises(InfrastructureError, match=r"ZeroDivisionError: no task \(.*test_worker.py:\d+\)"):
                await c.hub.request(PEER, group())

    asyncio.run(scenario())


def test_cancelled_requests_end_and_are_not_mentioned_again(controller: Any, engine: Any, environment: Any) -> None:
    ended = asyncio.Event()

    async def hold(task: Task, conversation: Conversation) -> None:
        try:
            await conversation.ask(task.messages)
        finally:
            ended.set()

    async def scenario() -> int:
        environment.hold = hold
        async with controller() as c:
            engine.gate.clear()
            asking = asyncio.create_task(c.hub.request(PEER, group()))
            await engine.arrived.wait()
            asking.cancel()
            await ended.wait()
            await c.hub.send(PEER, Cancel(request=12345))
            engine.gate.set()
            await c.hub.request(PEER, group(1))
            return int(c.hub.statistics.unclaimed)

    assert asyncio.run(scenario()) == 0
    assert engine.aborted == 1


def test_stop_cancels_what_runs_and_closes_everything(controller: Any, engine: Any, environment: Any) -> None:
    async def scenario() -> list[str]:
        async with controller() as c:
            engine.gate.clear()
            asking = asyncio.create_task(c.hub.request(PEER, group()))
            await engine.arrived.wait()
            await c.hub.send(PEER, Stop())
            await c.worker
            asking.cancel()
            coroutines: list[Any] = [task.get_coro() for task in asyncio.all_tasks()]
            return [c.__qualname__ for c in coroutines if "/prl/rollout/" in c.cr_code.co_filename]

    assert asyncio.run(scenario()) == []
    assert engine.aborted == 1
    assert environment.closed
    assert engine.closed


def test_main_returns_0_when_it_is_stopped(composition: Any, run_dir: RunDir) -> None:
    async def scenario() -> int:
        async with Hub(run_dir) as hub, asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(hub.serve())
            process = tasks.create_task(asyncio.to_thread(worker.main, composition, run_dir, 3))
            await hub.hello("environment", 3)
            await hub.send(PEER, Stop())
            code = await process
            serving.cancel()
        return code

    assert asyncio.run(scenario()) == 0


async def ended_with(composition: Any, run_dir: RunDir, send: Sequence[Any] = ()) -> tuple[str, BaseException | None]:
    """What the hub was told when a worker could not go on, and how the worker ended.

    In a thread: a connection that closes at once waits for the hub, which needs its event loop to let it in.
    """
    async with Hub(run_dir) as hub, asyncio.timeout(20):
        working = asyncio.create_task(asyncio.to_thread(worker.main, composition, run_dir, 3))
        serving = asyncio.create_task(hub.serve())
        if send:
            await hub.hello("environment", 3)
        for message in send:
            await hub.send(PEER, message)
        await asyncio.wait([working])
        with pytest.raises(RunError) as told:
            await serving
    return str(told.value), working.exception()


def test_an_environment_that_cannot_be_built_ends_the_run_with_its_reason(composition: Any, run_dir: RunDir) -> None:
    def build(section: Any, seed: int) -> Any:
        raise UserError("there is no file 'rows.jsonl'")

    composition.parts["fake:build"] = build
    told, raised = asyncio.run(ended_with(composition, run_dir))
    assert told == "environment-3 cannot go on: there is no file 'rows.jsonl'"
    assert isinstance(raised, UserError)


def test_a_message_that_is_not_for_it_ends_the_run(composition: Any, run_dir: RunDir, environment: Any) -> None:
    told, raised = asyncio.run(ended_with(composition, run_dir, [Retire(version=1)]))
    assert told.startswith("environment-3 cannot go on: malformed message, expected one of")
    assert raised is None
    assert environment.closed
