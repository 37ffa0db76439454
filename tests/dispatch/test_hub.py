"""The hub over its real socket: who gets which message, and who gets none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgpack
import pytest
import zmq
import zmq.asyncio
from prl.checkpoint_dir import FileRecord
from prl.dispatch.hub import DisconnectedError, Hub
from prl.errors import InfrastructureError, RunError
from prl.messages import (
    TO_WORKER,
    Cancel,
    Demonstrate,
    Demonstrations,
    Failed,
    GroupDone,
    Hello,
    Saved,
    StepDone,
    Stop,
)
from prl.run_dir import RunDir
from prl.types import Group, TaskRef
from prl.wire import AsyncConnection

from tests.dispatch.fakes import demonstration

ASK = Demonstrate(request=0, tasks=())
TASK = TaskRef(environment="toy", split="train", index=0)
GROUP = Group(group_id=0, task=TASK, attempt=0, started_version=0, rollouts=())


def hello(role: str = "environment", index: int = 0) -> Hello:
    return Hello(role=role, index=index, pid=1, host="here")


def done(step: int) -> StepDone:
    return StepDone(step=step, version=step, sums={}, values={}, seconds={})


def saved(step: int) -> Saved:
    return Saved(step=step, rank=0, files={"trainer/rank-0": FileRecord(nbytes=step, checksum=7)})


def play(path: Path, scene: Callable[[Hub, RunDir], Awaitable[None]]) -> None:
    """A hub that serves while the scene lasts."""

    async def body() -> None:
        run_dir = RunDir(path)
        run_dir.create_token()
        async with Hub(run_dir) as hub, asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(hub.serve())
            async with asyncio.timeout(20):
                await scene(hub, run_dir)
            serving.cancel()

    asyncio.run(body())


@asynccontextmanager
async def introduced(hub: Hub, run_dir: RunDir, role: str = "environment") -> AsyncIterator[AsyncConnection]:
    connection = AsyncConnection(run_dir, f"{role}-0")
    try:
        await connection.send(hello(role))
        await hub.hello(role, 0)
        yield connection
    finally:
        connection.close()


async def heard(hub: Hub, worker: AsyncConnection) -> None:
    """Everything that environment-0 said so far has arrived, and it is still listened to."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(hub.request(b"environment-0", ASK))
        message = await worker.receive(TO_WORKER)
        await worker.send(Demonstrations(request=message.request, samples=()))


def test_workers_introduce_themselves(tmp_path):
    async def scene(hub: Hub, run_dir: RunDir) -> None:
        connection = AsyncConnection(run_dir, "engine-3")
        sent = Hello(role="engine", index=3, pid=7, host="there", url="http://there:1")
        await connection.send(sent)
        assert await hub.hello("engine", 3) == (b"engine-3", sent)
        assert hub.present == {("engine", 3)}
        connection.close()

    play(tmp_path, scene)
    assert not (tmp_path / "controller.json").exists()


def test_answers_find_their_requests_in_any_order(tmp_path):
    async def scene(hub: Hub, run_dir: RunDir) -> None:
        async with introduced(hub, run_dir) as worker:
            async with asyncio.TaskGroup() as tasks:
                requests = [tasks.create_task(hub.request(b"environment-0", ASK)) for _ in range(3)]
                asked = [await worker.receive(TO_WORKER) for _ in range(3)]
                for message in reversed(asked):
                    await worker.send(Demonstrations(request=message.request, samples=()))
            assert [request.result().request for request in requests] == [message.request for message in asked]

    play(tmp_path, scene)


def test_a_request_that_fails_raises_with_the_workers_sentence(tmp_path):
    async def scene(hub: Hub, run_dir: RunDir) -> None:
        async with introduced(hub, run_dir) as worker:
            async with asyncio.TaskGroup() as tasks:
                request = tasks.create_task(fails(hub))
                message = await worker.receive(TO_WORKER)
                await worker.send(Failed(request=message.request, error="no such task"))
            assert request.result() == "environment-0: no such task"

    async def fails(hub: Hub) -> str:
        with pytest.raises(InfrastructureError) as caught:
            await hub.request(b"environment-0", ASK)
        return str(caught.value)

    play(tmp_path, scene)


def test_cancelling_a_request_tells_the_worker_and_a_late_answer_is_ignored(tmp_path):
    async def scene(hub: Hub, run_dir: RunDir) -> None:
        async with introduced(hub, run_dir) as worker:
            request = asyncio.ensure_future(hub.request(b"environment-0", ASK))
            message = await worker.receive(TO_WORKER)
            request.cancel()
            assert await worker.receive(TO_WORKER) == Cancel(request=message.request)
            await worker.send(Demonstrations(request=message.request, samples=()))
            await heard(hub, worker)
            assert hub.statistics.unclaimed == 1

    play(tmp_path, scene)


def test_trainer_reports_wait_in_the_inbox_of_their_rank(tmp_path):
    async def scene(hub: Hub, run_dir: RunDir) -> None:
        async with introduced(hub, run_dir, "trainer") as rank:
            for step in (1, 2):
                await rank.send(saved(step))
                await rank.send(done(step))
            assert [await hub.reply(b"trainer-0"), await hub.reply(b"trainer-0")] == [done(1), done(2)]
            assert [await hub.saved(0), await hub.saved(0)] == [saved(1), saved(2)]


def test_a_rank_may_say_that_it_saved_over_another_connection(tmp_path):
    async def scene(hub: Hub, run_dir: RunDir) -> None:
        async with introduced(hub, run_dir, "trainer"):
            writer = AsyncConnection(run_dir, "trainer-0-checkpoints")
            await writer.send(saved(1))
            assert await hub.saved(0) == saved(1)
            writer.close()

    play(tmp_path, scene)


def test_a_peer_that_left_cannot_be_sent_to(tmp_path):
    async def scene(hub: Hub, run_dir: RunDir) -> None:
        with pytest.raises(DisconnectedError, match="worker environment-9 is not connected"):
            await hub.send(b"environment-9", Stop())

    play(tmp_path, scene)


def test_a_fatal_failure_ends_the_run(tmp_path):
    async def scene(hub: Hub, run_dir: RunDir) -> None:
        async with introduced(hub, run_dir) as worker:
            await worker.send(Failed(error="out of memory", fatal=True))
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as caught:
        play(tmp_path, scene)
    (error,) = caught.value.exceptions
    assert isinstance(error, RunError)
    assert str(error) == "environment-0 cannot go on: out of memory"


def test_a_failure_that_is_nobodys_is_survived(tmp_path):
    async def scene(hub: Hub, run_dir: RunDir) -> None:
        async with introduced(hub, run_dir) as worker:
            await worker.send(Failed(error="a hiccup"))
            await heard(hub, worker)

    play(tmp_path, scene)


@pytest.mark.parametrize(
    "frames", [[b"junk"], [b""], [msgpack.packb(["Stop", {}])], [msgpack.packb(["Saved", {"step": 1}])]]
)
def test_a_malformed_or_unexpected_message_harms_nobody(tmp_path, frames):
    async def scene(hub: Hub, run_dir: RunDir) -> None:
        async with introduced(hub, run_dir) as worker:
            await worker._socket.send_multipart(frames)
            await heard(hub, worker)
            assert hub.statistics.malformed == 1
            assert hub.statistics.received == 3

    play(tmp_path, scene)


def test_only_the_worker_that_was_asked_can_answer(tmp_path):
    async def scene(hub: Hub, run_dir: RunDir) -> None:
        other = AsyncConnection(run_dir, "environment-1")
        await other.send(hello(index=1))
        await hub.hello("environment", 1)
        async with introduced(hub, run_dir) as worker, asyncio.TaskGroup() as tasks:
            request = tasks.create_task(hub.request(b"environment-0", ASK))
            message = await worker.receive(TO_WORKER)
            await other.send(Demonstrations(request=message.request, samples=(demonstration(1),)))
            await other.send(Failed(request=message.request, error="not mine to say"))
            tasks.create_task(hub.request(b"environment-1", ASK))
            mine = await other.receive(TO_WORKER)
            await other.send(Demonstrations(request=mine.request, samples=()))
            await worker.send(Demonstrations(request=message.request, samples=()))
        assert request.result().samples == ()
        assert hub.statistics.unclaimed == 1
        other.close()

    play(tmp_path, scene)


def test_an_answer_to_another_question_fails_the_request(tmp_path):
    async def scene(hub: Hub, run_dir: RunDir) -> None:
        async with introduced(hub, run_dir) as worker:
            async with asyncio.TaskGroup() as tasks:
                request = tasks.create_task(fails(hub))
                message = await worker.receive(TO_WORKER)
                await worker.send(GroupDone(request=message.request, group=GROUP))
            assert request.result() == "environment-0: GroupDone in answer to a request for Demonstrations"

    async def fails(hub: Hub) -> str:
        with pytest.raises(InfrastructureError) as caught:
            await hub.request(b"environment-0", ASK)
        return str(caught.value)

    play(tmp_path, scene)


def test_nobody_speaks_in_the_name_of_another_worker(tmp_path):
    async def scene(hub: Hub, run_dir: RunDir) -> None:
        async with introduced(hub, run_dir) as worker:
            await worker.send(hello("trainer"))
            await worker.send(hello(index=1))
            await heard(hub, worker)
            assert hub.present == {("environment", 0)}
            assert hub.statistics.malformed == 2

    play(tmp_path, scene)


def test_messages_that_wait_do_not_hold_up_the_loop(tmp_path):
    async def scene(hub: Hub, run_dir: RunDir) -> None:
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                before = hub.statistics.received
                await asyncio.sleep(0)
                most = max(most, hub.statistics.received - before)

        async with introduced(hub, run_dir) as worker, asyncio.TaskGroup() as tasks:
            for _ in range(200):
                await worker.send(Failed(error="a hiccup"))
            watching = tasks.create_task(watch())
            await heard(hub, worker)
            assert hub.statistics.received == 1 + 200 + 1
            assert most == 1
            watching.cancel()

    play(tmp_path, scene)


@pytest.mark.parametrize("password", [None, b"wrong"])
def test_without_the_runs_token_nobody_is_heard(tmp_path, password):
    async def scene(hub: Hub, run_dir: RunDir) -> None:
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as stranger:
            stranger.linger = 0
            if password is not None:
                stranger.plain_username, stranger.plain_password = b"prl", password
            failed = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            failed |= zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL  # where it sees first that the hub hung up
            with stranger.get_monitor_socket(failed | zmq.EVENT_HANDSHAKE_SUCCEEDED) as monitor:
                stranger.connect(json.loads(run_dir.controller.read_text())["address"])
                event, _ = await monitor.recv_multipart()
                assert int.from_bytes(event[:2], "little") & failed
                assert hub.statistics.received == 0
                stranger.disable_monitor()

    play(tmp_path, scene)


def test_a_worker_waits_only_so_long_for_a_controller(tmp_path):
    run_dir = RunDir(tmp_path)

    async def body() -> None:
        AsyncConnection(run_dir, "environment-0", timeout=0.01)

    with pytest.raises(InfrastructureError, match="the controller did not listen within 0 s"):
        asyncio.run(body())
