"""The engine process: it says hello when it listens, ends on Stop, and takes the run down when it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from prl.compose.config import EngineConfig, WeightTransportConfig
from prl.dispatch.hub import Hub
from prl.errors import RunError
from prl.messages import Cancel, Stop
from prl.providers import Engine, WeightTransport
from prl.run_dir import RunDir
from prl.weights.engines import EngineContext, main
from prl.wire import WireError


class Receiver:
    closed = False

    def close(self) -> None:
        self.closed = True


class Composed:
    """Stands in for a composition: one engine whose `serve` is the test's, one transport."""

    def __init__(self, serve: Callable[[EngineContext], Awaitable[None]]) -> None:
        self.run = self
        self.engine = EngineConfig(host="127.0.0.3")
        self.weights = WeightTransportConfig()
        self.receiver = Receiver()
        self.controller_error: BaseException | None = None
        self._parts: dict[str, Any] = {"serve": serve, "receive": lambda config, folder: self.receiver}

    def provider(self, section: object) -> Engine | WeightTransport:
        if section is self.engine:
            return Engine(name="e", config=EngineConfig, summary="", serve="serve", connect="connect")
        return WeightTransport(name="w", config=WeightTransportConfig, summary="", send="send", receive="receive")

    def load(self, ref: str) -> Any:
        return self._parts[ref]


def controlled(folder: Path, composed: Composed, controller: Callable[[Hub], Awaitable[None]]) -> int | BaseException:
    """Run `main` of engine 3 in a thread beside a hub, until both are done; what `main` returned or raised."""
    run_dir = RunDir(folder)
    run_dir.create_token()
    outcome: list[int | BaseException] = []

    def process() -> None:
        try:
            outcome.append(main(composed, run_dir, 3))  # type: ignore[arg-type]
        except Exception as error:
            outcome.append(error)

    async def run() -> None:
        async with asyncio.timeout(60), Hub(run_dir) as hub, asyncio.TaskGroup() as tasks:
            engine = tasks.create_task(asyncio.to_thread(process))
            serving = tasks.create_task(hub.serve())
            await controller(hub)
            await engine
            serving.cancel()

    try:
        asyncio.run(run())  # waits for the thread, whatever happens
    except ExceptionGroup as group:
        composed.controller_error = group.exceptions[0]
    return outcome[0]


def test_an_engine_announces_itself_and_ends_on_stop(tmp_path: Path) -> None:
    contexts: list[EngineContext] = []

    async def serve(context: EngineContext) -> None:
        contexts.append(context)
        await context.announce("http://somewhere:1")
        await asyncio.Event().wait()

    async def controller(hub: Hub) -> None:
        peer, hello = await hub.hello("engine", 3)
        assert (peer, hello.url) == (b"engine-3", "http://somewhere:1")
        await hub.send(peer, Stop())

    composed = Composed(serve)
    assert controlled(tmp_path, composed, controller) == 0
    (context,) = contexts
    assert (context.index, context.host, context.token) == (3, "127.0.0.3", RunDir(tmp_path).token())
    assert context.receiver is composed.receiver
    assert composed.receiver.closed


async def forever(hub: Hub) -> None:
    await asyncio.Event().wait()


async def nothing(hub: Hub) -> None:
    """The engine is not told to stop."""


def test_an_engine_that_cannot_ever_serve_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    async def serve(context: EngineContext) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(refuse())

    async def refuse() -> None:
        raise RunError("this engine has no kernel for such a model")

    composed = Composed(serve)
    assert isinstance(controlled(tmp_path, composed, forever), RunError)
    assert str(composed.controller_error) == (
        "engine-3 cannot go on: RunError: this engine has no kernel for such a model"
    )
    assert composed.receiver.closed


def test_an_engine_that_breaks_ends_its_process_and_not_the_run(tmp_path: Path) -> None:
    async def serve(context: EngineContext) -> None:
        raise MemoryError("no room for the caches")

    composed = Composed(serve)
    assert isinstance(controlled(tmp_path, composed, nothing), MemoryError)
    assert composed.controller_error is None
    assert composed.receiver.closed


def test_an_engine_that_just_returns_has_failed(tmp_path: Path) -> None:
    async def serve(context: EngineContext) -> None:
        return

    composed = Composed(serve)
    assert str(controlled(tmp_path, composed, nothing)) == "engine 3 stopped serving by itself"
    assert composed.controller_error is None


def test_a_message_that_is_not_for_engines_ends_the_process(tmp_path: Path) -> None:
    async def serve(context: EngineContext) -> None:
        await context.announce("http://somewhere:1")
        await asyncio.Event().wait()

    async def controller(hub: Hub) -> None:
        peer, _ = await hub.hello("engine", 3)
        await hub.send(peer, Cancel(request=1))
        await forever(hub)

    composed = Composed(serve)
    assert isinstance(controlled(tmp_path, composed, controller), WireError)
    assert "expected one of Stop" in str(composed.controller_error)
