"""Engines that span nodes: which data-parallel ranks are where, and how the nodes of one meet.

    engine        node 0       vLLM's API server, and the first of its engine cores     writes meeting.json
    engine-part   node 1..     more of its engine cores, no API server (headless)       read it, join, join again

The API server spreads requests over all ranks and carries every call (pause, weights) to all of them. Where it listens
for its nodes is a free port of the run's network, new with each life of the engine. vLLM's cores cannot be replaced one
by one: a part that dies has its engine end, an engine that dies has its parts leave; whoever supervises the run starts
both again, and they meet anew.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import attrs
from prl import network
from prl.compose.routing import replayed
from prl.errors import InfrastructureError
from prl.run_dir import RunDir, read_json

from prl_vllm import arguments as vllm
from prl_vllm import model_files
from prl_vllm.config import Parallel, VllmConfig
from prl_vllm.process import headless

if TYPE_CHECKING:
    from prl.weights.engines import EngineContext

POLL_SECONDS = 0.2


@attrs.frozen(kw_only=True)
class Meeting:
    """Where the first node of an engine waits for the others."""

    address: str
    port: int
    life: str
    """Another for every life of the engine."""


def arguments(parallel: Parallel, node: int, meeting: Meeting) -> dict[str, Any]:
    """What a node is told beyond what all of its engine are; Python name -> value."""
    return {
        "data_parallel_size_local": parallel.local,
        "data_parallel_address": meeting.address,
        "data_parallel_rpc_port": meeting.port,
        **({"data_parallel_start_rank": node * parallel.local} if node else {}),
    }


def environment(address: str) -> dict[str, str]:
    """Everything listens on this host's address on the run's network, and on no other."""
    interfaces = {key: os.environ.get(key, name) for key, name in network.interfaces(address).items()}
    return {"VLLM_HOST_IP": address, **interfaces}


# --- the first node ---------------------------------------------------------------------------------------------------
@asynccontextmanager
async def meeting(context: EngineContext) -> AsyncIterator[Meeting]:
    """Announced for as long as the engine lives."""
    address = network.address(context.composition.run)
    found = Meeting(address=address, port=network.free_port(address), life=secrets.token_hex(8))
    file = _file(context.run_dir, context.index)
    file.parent.mkdir(parents=True, exist_ok=True)
    context.run_dir.write_json(file, attrs.asdict(found))
    try:
        yield found
    finally:
        file.unlink(missing_ok=True)


async def deserted(context: EngineContext, found: Meeting) -> None:
    """Wait until a part that had joined this life of the engine is gone; always raises."""
    file = _left(context.run_dir, context.index, found.life)
    while not file.exists():
        await asyncio.sleep(POLL_SECONDS)
    raise InfrastructureError(f"a node of engine {context.index} is gone: {file.read_text()}")


# --- the others -------------------------------------------------------------------------------------------------------
async def join(context: EngineContext) -> None:
    """Be part of every life of the engine, until cancelled or until vLLM ends by itself."""
    run = context.composition.run
    config = cast(VllmConfig, run.engine)
    described = await asyncio.to_thread(model_files.describe, context.composition)
    cpu = vllm.on_cpu(run)
    folder = context.run_dir.path / "engines" / f"{context.index}-{context.node}"
    model_files.write(described, folder, length=config.length or run.rollouts.sequence_length, cpu=cpu)
    route_bytes = described.route_bytes(replayed(context.composition))
    _desert(context, "its process was started again")
    told = False
    while True:
        found = await _next_life(context)
        values = vllm.arguments(run, config, described, model=folder, cpu=cpu, route_bytes=route_bytes)
        values |= arguments(config.parallel, context.node, found)
        words = [*vllm.command_line(values)]
        variables = vllm.environment(config, cpu=cpu, routes=bool(route_bytes))
        _joined(context).write_text(found.life)
        async with headless(words, {**variables, **environment(network.address(run))}) as process:
            if not told:
                await context.announce("")
                told = True
            await _until_over(context, found, process)


async def _next_life(context: EngineContext) -> Meeting:
    """Waits for one that was not joined yet."""
    file, joined = _file(context.run_dir, context.index), _joined(context)
    while True:
        known = joined.read_text() if joined.exists() else ""
        fields = read_json(file)
        if fields is not None and fields["life"] != known:
            return Meeting(**fields)
        await asyncio.sleep(POLL_SECONDS)


async def _until_over(context: EngineContext, found: Meeting, process: asyncio.subprocess.Process) -> None:
    """This life of the engine ends; InfrastructureError when vLLM ended before it."""
    file = _file(context.run_dir, context.index)
    while (read_json(file) or {}).get("life") == found.life:
        if process.returncode is not None:
            sentence = f"vLLM on {socket.gethostname()} ended by itself with exit code {process.returncode}"
            _desert(context, sentence)
            raise InfrastructureError(sentence)
        await asyncio.sleep(POLL_SECONDS)


def _desert(context: EngineContext, why: str) -> None:
    """Tell the life of the engine that was joined last that it is no more whole."""
    joined = _joined(context)
    if joined.exists():
        left = _left(context.run_dir, context.index, joined.read_text())
        left.write_text(f"engine-part on node {context.node}: {why}")


# --- files ------------------------------------------------------------------------------------------------------------
def _file(run_dir: RunDir, engine: int) -> Path:
    return run_dir.path / "engines" / f"meeting-{engine}.json"


def _joined(context: EngineContext) -> Path:
    """The life that a part has joined, for the part's next process."""
    return context.run_dir.path / "engines" / f"joined-{context.index}-{context.node}"


def _left(run_dir: RunDir, engine: int, life: str) -> Path:
    return run_dir.path / "engines" / f"left-{engine}-{life}"
