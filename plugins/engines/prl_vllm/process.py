"""A vLLM server as a child of this process: started, waited for until it is healthy, ended with everything it started.

It listens on a socket in a folder that only this user can enter: its endpoints for pausing and for calls into workers
know no authentication.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import attrs
from prl.errors import InfrastructureError

from prl_vllm.api import VllmApi

GRACE_SECONDS = 5.0
POLL_SECONDS = 0.2
MODULE = "vllm.entrypoints.openai.api_server"
"""The command `vllm` of the CPU build asks for the metadata of a distribution by another name, and ends."""
HEADLESS = "prl_vllm.inside.headless"


@attrs.frozen(eq=False)
class Server:
    """A server that runs."""

    api: VllmApi
    process: asyncio.subprocess.Process

    async def ended(self) -> None:
        """Wait for what should not happen; always raises."""
        code = await self.process.wait()
        raise InfrastructureError(f"vLLM's server (process {self.process.pid}) ended by itself with exit code {code}")


@asynccontextmanager
async def started(arguments: Sequence[str], environment: Mapping[str, str], *, startup: float) -> AsyncIterator[Server]:
    """A healthy server; ended when the block is left. What it prints goes where this process prints.

    InfrastructureError when it ends, or is not healthy after `startup` seconds.
    """
    folder = Path(tempfile.mkdtemp(prefix="prl-vllm-"))
    socket = folder / "socket"
    process = await _process(MODULE, "--uds", str(socket), *arguments, environment=environment)
    api = VllmApi("http://vllm", socket=socket)
    try:
        await _healthy(api, process, startup)
        yield Server(api, process)
    finally:
        await api.aclose()
        await _end(process)
        shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def headless(
    arguments: Sequence[str], environment: Mapping[str, str]
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Engine cores without an API server; ended when the block is left."""
    process = await _process(HEADLESS, *arguments, environment=environment)
    try:
        yield process
    finally:
        await _end(process)


async def _process(module: str, *arguments: str, environment: Mapping[str, str]) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        env={**os.environ, **environment},
        stdin=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )


async def _healthy(api: VllmApi, process: asyncio.subprocess.Process, startup: float) -> None:
    try:
        async with asyncio.timeout(startup):
            while not await api.healthy():
                if process.returncode is not None:
                    raise InfrastructureError(
                        f"vLLM's server ended with exit code {process.returncode} before it was ready; its last words "
                        "are in this process's log"
                    )
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        raise InfrastructureError(
            f"vLLM's server was not ready after engine.startup = {startup:.0f} s; what it did is in this process's log"
        ) from None


async def _end(process: asyncio.subprocess.Process) -> None:
    """Its own way of ending first; then the whole session."""
    if process.returncode is None:
        process.terminate()
        with suppress(TimeoutError):
            async with asyncio.timeout(GRACE_SECONDS):
                await process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
