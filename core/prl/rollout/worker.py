"""The environment process: builds the environments that are not cheap and rolls out what the controller sends.

    controller ── RunGroup, Demonstrate ──►  one task per request  ── GroupDone, Demonstrations, Failed ──► controller
                  KeepInFlight                                        InFlightKept
                  Cancel ──► ends that task     Stop ──► ends them all, closes everything, exit 0

How much runs at once is the controller's decision; nothing is queued here. A request that fails is answered with the
reason and the process lives on. Imports no torch. Started by `prl worker --role environment`.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TypeAlias

from prl.compose.compose import Composition
from prl.errors import PrlError
from prl.messages import (
    Cancel,
    Demonstrate,
    Demonstrations,
    Failed,
    GroupDone,
    Hello,
    InFlightKept,
    KeepInFlight,
    RunGroup,
    Stop,
)
from prl.rollout.runner import GroupRunner, describe, environment_names
from prl.run_dir import RunDir
from prl.wire import AsyncConnection, WireError

Work: TypeAlias = RunGroup | Demonstrate | KeepInFlight


def main(composition: Composition, run_dir: RunDir, index: int) -> int:
    """Serve until `Stop`; the exit code of the process."""
    asyncio.run(work(composition, run_dir, index))
    return 0


async def work(composition: Composition, run_dir: RunDir, index: int) -> None:
    """Build the environments, say Hello, serve, close everything."""
    async with AsyncExitStack() as stack:
        connection = AsyncConnection(run_dir, f"environment-{index}")
        stack.callback(connection.close)
        runner = await _build(composition, run_dir, connection)
        stack.push_async_callback(runner.aclose)
        await connection.send(
            Hello(role="environment", index=index, pid=os.getpid(), host=socket.gethostname(), sizes=runner.sizes())
        )
        await RequestDesk(connection, runner).serve()


async def _build(composition: Composition, run_dir: RunDir, connection: AsyncConnection) -> GroupRunner:
    """The environments; what keeps them from being built ends the run with its reason."""
    names = environment_names(composition, cheap=False)
    try:
        token = run_dir.token()
        return GroupRunner(composition, composition.run, token, columns=run_dir.columns, environments=names)
    except PrlError as error:
        await connection.send(Failed(error=str(error), fatal=True))
        raise


class RequestDesk:
    """One task per request, all of them in one TaskGroup."""

    def __init__(self, connection: AsyncConnection, runner: GroupRunner) -> None:
        self._connection = connection
        self._runner = runner
        self._requests: dict[int, asyncio.Task[None]] = {}

    async def serve(self) -> None:
        """Answer requests until `Stop`, which cancels those that still run."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                message = await self._receive()
                if isinstance(message, Stop):
                    break
                if isinstance(message, Cancel):
                    self._cancel(message.request)
                else:
                    self._start(tasks, message)
            for request in tuple(self._requests):
                self._cancel(request)

    async def _receive(self) -> Work | Cancel | Stop:
        """The next message; one that cannot be read means that the controller speaks another protocol."""
        try:
            kinds = (RunGroup, Demonstrate, KeepInFlight, Cancel, Stop)
            message: Work | Cancel | Stop = await self._connection.receive(kinds)
            return message
        except WireError as error:
            await self._connection.send(Failed(error=str(error), fatal=True))
            return Stop()

    def _start(self, tasks: asyncio.TaskGroup, message: Work) -> None:
        task = tasks.create_task(self._answer(message))
        self._requests[message.request] = task
        task.add_done_callback(lambda _: self._requests.pop(message.request, None))

    def _cancel(self, request: int) -> None:
        task = self._requests.pop(request, None)
        if task is not None:
            task.cancel()

    async def _answer(self, message: Work) -> None:
        reply: GroupDone | Demonstrations | InFlightKept | Failed
        try:
            match message:
                case RunGroup():
                    reply = GroupDone(request=message.request, group=await self._runner.run(message))
                case Demonstrate():
                    samples = await self._runner.demonstrate(message.tasks)
                    reply = Demonstrations(request=message.request, samples=samples)
                case KeepInFlight():
                    kept = await self._runner.keep_in_flight(Path(message.path), message.version)
                    reply = InFlightKept(request=message.request, groups=kept)
        except Exception as error:  # the controller decides what becomes of the request; this process lives on
            reply = Failed(request=message.request, error=describe(error))
        await self._connection.send(reply)
