"""The engine process: hands the provider's `serve` what it needs, and ends when the controller says so.

    controller ◄── Hello(url) ── serve, once it listens
               ── Stop ──► the process ends with exit code 0

Weights and requests reach an engine over its own HTTP server; the connection to the controller says only that the
engine is there and when it must go. Knows nothing of what an engine is made of. Started by `prl worker --role engine`.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Literal, cast

import attrs

from prl import network
from prl.compose.compose import Composition
from prl.errors import InfrastructureError, is_final
from prl.messages import Failed, Hello, Stop
from prl.providers import Engine, Ref, WeightReceiver, WeightTransport
from prl.run_dir import RunDir
from prl.wire import AsyncConnection, WireError


@attrs.frozen(kw_only=True)
class EngineContext:
    """What the `serve` part of an engine provider is called with."""

    composition: Composition
    run_dir: RunDir
    index: int
    node: int = 0
    """Of an engine that spans nodes: which of them this is."""
    host: str
    """Address to bind to."""
    token: str
    """What every request must bring."""
    receiver: WeightReceiver
    """Engine side of the run's weight transport."""
    announce: Callable[[str], Awaitable[None]]
    """Tell the controller the URL at which this engine listens."""


def main(composition: Composition, run_dir: RunDir, index: int) -> int:
    """Serve until `Stop`; the exit code of the process."""
    asyncio.run(work(composition, run_dir, Duty(role="engine", number=index, engine=index)))
    return 0


@attrs.frozen(kw_only=True)
class Duty:
    """What a process of an engine is there for."""

    role: Literal["engine", "engine-part"]
    number: int
    """Among the processes of its role."""
    engine: int
    node: int = 0
    """Of the engine's nodes."""

    def part(self, provider: Engine) -> Ref:
        return provider.serve if self.role == "engine" else provider.join


async def work(composition: Composition, run_dir: RunDir, duty: Duty) -> None:
    """Do it until `Stop`."""
    connection = AsyncConnection(run_dir, f"{duty.role}-{duty.number}")
    try:
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(_serve(composition, run_dir, duty, connection))
            await _stopped(connection)
            serving.cancel()
    except ExceptionGroup as group:
        raise _first(group) from group
    finally:
        connection.close()


async def _serve(composition: Composition, run_dir: RunDir, duty: Duty, connection: AsyncConnection) -> None:
    """Run the provider's part; it only ends by failing, and ends the run where a restart would not mend it."""

    async def announce(url: str) -> None:
        host = socket.gethostname()
        await connection.send(Hello(role=duty.role, index=duty.number, url=url, pid=os.getpid(), host=host))

    try:
        await serve(composition, run_dir, duty, announce)
        raise InfrastructureError(f"{duty.role} {duty.number} stopped serving by itself")
    except Exception as error:  # whatever it is, the controller must know before this process is gone
        await connection.send(Failed(error=_sentence(error), fatal=is_final(_first(error))))
        raise


async def serve(
    composition: Composition, run_dir: RunDir, duty: Duty, announce: Callable[[str], Awaitable[None]]
) -> None:
    """Run the provider's part until it ends or is cancelled; `announce` is told the URL at which an engine listens."""
    run = composition.run
    part = composition.load(duty.part(cast(Engine, composition.provider(run.engine))))
    receive = composition.load(cast(WeightTransport, composition.provider(run.weights)).receive)
    receiver: WeightReceiver = receive(run.weights, run_dir.path)
    context = EngineContext(
        composition=composition,
        run_dir=run_dir,
        index=duty.engine,
        node=duty.node,
        host=run.engine.host or network.address(run),
        token=run_dir.token(),
        receiver=receiver,
        announce=announce,
    )
    try:
        await part(context)
    finally:
        receiver.close()


async def _stopped(connection: AsyncConnection) -> None:
    """Until `Stop`; a controller that says anything else speaks another protocol, and nothing it wants can be done."""
    try:
        await connection.receive((Stop,))
    except WireError as error:
        await connection.send(Failed(error=str(error), fatal=True))
        raise


def _first(error: BaseException) -> BaseException:
    """The failure inside nested groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _sentence(error: Exception) -> str:
    inner = _first(error)
    return f"{type(inner).__name__}: {inner}"
