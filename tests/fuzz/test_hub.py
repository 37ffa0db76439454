"""The hub's socket under fire: whatever one peer sends, the hub goes on serving the other, and keeps nothing of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import zmq
import zmq.asyncio
from hypothesis import assume, given
from prl import wire
from prl.dispatch.hub import Hub
from prl.messages import TO_CONTROLLER, TO_WORKER, Demonstrate, Demonstrations, Failed, Hello
from prl.run_dir import RunDir
from prl.wire import AsyncConnection

from tests.fuzz.hostile import fuzzed, messages

ASK = Demonstrate(request=0, tasks=())
SLOWEST = 5.0  # seconds in which the hub must be through with one message


@attrs.define(eq=False)
class Arena:
    """One loop with a hub, a well-behaved worker and a hostile one; it stands still between two examples."""

    run_dir: RunDir
    runner: asyncio.Runner = attrs.field(factory=asyncio.Runner)
    hub: Hub = attrs.field(init=False)
    worker: AsyncConnection = attrs.field(init=False)
    attacker: Any = attrs.field(init=False)
    _serving: asyncio.Task[None] = attrs.field(init=False)

    def run(self, coroutine: Any) -> Any:
        return self.runner.run(coroutine)

    async def open(self) -> None:
        self.hub = await Hub(self.run_dir).__aenter__()
        self._serving = asyncio.get_running_loop().create_task(self.hub.serve())
        self.worker = AsyncConnection(self.run_dir, "environment-0")
        await self.worker.send(Hello(role="environment", index=0, pid=1, host="here"))
        await self.hub.hello("environment", 0)
        self.attacker = self.dealer(self.run_dir.token())

    def dealer(self, password: str) -> Any:
        socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        socket.identity, socket.linger = b"environment-7", 0
        socket.plain_username, socket.plain_password = b"prl", password.encode()
        socket.connect(json.loads(self.run_dir.controller.read_text())["address"])
        return socket

    async def close(self) -> None:
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)
        self.worker.close()
        self.attacker.close()
        await self.hub.__aexit__(None, None, None)

    async def attack(self, frames: list[bytes]) -> None:
        """Send it and wait until the hub has taken it in."""
        received, started = self.hub.statistics.received + 1, time.monotonic()
        await self.attacker.send_multipart(frames)
        while self.hub.statistics.received < received:
            assert time.monotonic() < started + SLOWEST
            assert not self._serving.done()
            await asyncio.sleep(0)

    async def serves(self) -> None:
        """The worker is asked something and answers."""
        async with asyncio.timeout(SLOWEST), asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(self.hub.request(b"environment-0", ASK))
            message = await self.worker.receive(TO_WORKER)
            await self.worker.send(Demonstrations(request=message.request, samples=()))
        assert asking.result().samples == ()


@contextmanager
def opened(folder: Path) -> Iterator[Arena]:
    run_dir = RunDir(folder)
    run_dir.create_token()
    arena = Arena(run_dir)
    with arena.runner:
        arena.run(arena.open())
        try:
            yield arena
        finally:
            arena.run(arena.close())


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    with opened(tmp_path_factory.mktemp("hub")) as arena:
        yield arena


def _sense(frames: list[bytes]) -> Any:
    try:
        return wire.decode(frames, TO_CONTROLLER)
    except wire.WireError:
        return None


@fuzzed
@given(frames=messages)
def test_whatever_a_peer_sends_the_hub_serves_the_others(arena, frames):
    message = _sense(frames)
    assume(not (isinstance(message, Failed) and message.fatal))  # a worker that may end the run has ended it
    malformed = arena.hub.statistics.malformed
    arena.run(arena.attack(frames))
    assert message is not None or arena.hub.statistics.malformed == malformed + 1
    arena.run(arena.serves())
    assert arena.hub.present <= {("environment", 0), ("environment", 7)}
    assert not arena.hub._requests
    assert not arena.hub._inboxes
    assert len(asyncio.all_tasks(arena.runner.get_loop())) <= 3  # serve, the authenticator, and nothing of the attack


@fuzzed
@given(frames=messages)
def test_only_who_was_asked_can_answer(arena, frames):
    """The attacker speaks first, with whatever request number it likes; the answer is the worker's all the same."""
    message = _sense(frames)
    assume(not (isinstance(message, Failed) and message.fatal))

    async def scene() -> None:
        async with asyncio.timeout(SLOWEST), asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(arena.hub.request(b"environment-0", ASK))
            asked = await arena.worker.receive(TO_WORKER)
            if hasattr(message, "request"):
                await arena.attack([bytes(f) for f in wire.encode(attrs.evolve(message, request=asked.request))])
            await arena.attack(frames)
            assert not asking.done()
            await arena.worker.send(Demonstrations(request=asked.request, samples=()))
        assert asking.result().samples == ()

    arena.run(scene())


def test_a_frame_that_is_too_large_is_not_even_received(tmp_path, monkeypatch):
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 1 << 16)

    async def scene(arena: Arena) -> None:
        with arena.attacker.get_monitor_socket(zmq.EVENT_DISCONNECTED) as monitor:
            await arena.attacker.send_multipart([b"x", bytes(1 << 17)])
            await monitor.recv_multipart()
            arena.attacker.disable_monitor()
        await arena.serves()
        assert arena.hub.statistics.received == 2  # Hello, and the answer just given

    with opened(tmp_path) as arena:
        arena.run(scene(arena))
