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
from typing import cast

import attrs

from prl import network
from prl.compose.compose import Composition
from prl.errors import InfrastructureError, is_final
from prl.messages import Failed, Hello, Stop
from prl.providers import Engine, WeightReceiver, WeightTransport
from prl.run_dir import RunDir
from prl.wire import AsyncConnection, WireError


@attrs.frozen(kw_only=True)
class EngineContext:
    """What the `serve` part of an engine provider is called with."""

    composition: Composition
    run_dir: RunDir
    index: int
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
    asyncio.run(_work(composition, run_dir, index))
    return 0


async def _work(composition: Composition, run_dir: RunDir, index: int) -> None:
    connection = AsyncConnection(run_dir, f"engine-{index}")
    try:
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(_serve(composition, run_dir, index, connection))
            await _stopped(connection)
            serving.cancel()
    except ExceptionGroup as group:
        raise _first(group) from group
    finally:
        connection.close()


async def _serve(composition: Composition, run_dir: RunDir, index: int, connection: AsyncConnection) -> None:
    """Run the provider's `serve`; it only ends by failing, and ends the run where a restart would not mend it."""
    run = composition.run

    async def announce(url: str) -> None:
        await connection.send(Hello(role="engine", index=index, url=url, pid=os.getpid(), host=socket.gethostname()))

    try:
        serve = composition.load(cast(Engine, composition.provider(run.engine)).serve)
        receive = composition.load(cast(WeightTransport, composition.provider(run.weights)).receive)
        receiver: WeightReceiver = receive(run.weights, run_dir.path)
        try:
            await serve(
                EngineContext(
                    composition=composition,
                    run_dir=run_dir,
                    index=index,
                    host=run.engine.host or network.address(run),
                    token=run_dir.token(),
                    receiver=receiver,
                    announce=announce,
                )
            )
        finally:
            receiver.close()
        raise InfrastructureError(f"engine {index} stopped serving by itself")
    except Exception as error:  # whatever it is, the controller must know before this process is gone
        await connection.send(Failed(error=_sentence(error), fatal=is_final(_first(error))))
        raise


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
