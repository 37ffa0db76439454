"""The engine process: starts a vLLM server or joins one, and serves the run's HTTP API in front of it.

    environment workers, people ──► this process ──► vLLM's API server ──► its engine core and workers
    controller ── prepare, commit ──┘  (token)       (a socket only this user can open)

Ends, with the reason, when vLLM does. Called by `prl.weights.engines`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from aiohttp import web
from aiohttp.typedefs import Handler
from prl import network
from prl.compose.routing import replayed
from prl.errors import InfrastructureError, UserError
from prl.serve.application import application, listening

from prl_vllm import arguments as vllm
from prl_vllm import handover, model_files, release, spanning
from prl_vllm.api import VllmApi
from prl_vllm.config import VllmConfig
from prl_vllm.engine import Engine
from prl_vllm.handover import Prefills
from prl_vllm.inside import KEY_VARIABLE, PROTOCOL
from prl_vllm.model_files import Described
from prl_vllm.process import started

if TYPE_CHECKING:
    from prl.weights.engines import EngineContext

Ends: TypeAlias = Callable[[], Coroutine[None, None, None]]
HEALTH_SECONDS = 5.0
"""Between two looks at a server that was joined."""


async def serve(context: EngineContext) -> None:
    """Announce the engine once vLLM is ready, and serve until cancelled or until vLLM ends."""
    run = context.composition.run
    config = cast(VllmConfig, run.engine)
    described = await asyncio.to_thread(model_files.describe, context.composition)
    async with _server(context, config, described) as (api, ends), _prefills(context, config) as prefills:
        description = await _expect_extension(api)
        engine = Engine(
            api,
            run_dir=str(context.run_dir.path),
            shapes=described.shapes,
            length=config.length or run.rollouts.sequence_length,
            vocab_size=described.speech.tokenizer.vocab_size,
            sequences=config.sequences * config.parallel.data,
            recompute=config.on_update == "recompute",
            tells_versions=description["tells_versions"],
            prefills=prefills,
        )
        app = application(engine, described.speech, context.token)
        app.add_routes([web.get("/weights/checksums", _checksums(engine))])
        computes_prompts = config.kind_of(context.index) == "prefill"
        if computes_prompts:
            prompts = handover.PrefillEndpoint(engine)
            app.add_routes([web.post(handover.PATH, prompts.prefill), web.post(handover.RELEASE, prompts.release)])
        async with asyncio.TaskGroup() as tasks:
            for end in ends:
                tasks.create_task(end())
            tasks.create_task(_broken(engine))
            async with listening(app, context.host) as url:
                if computes_prompts:
                    handover.announce(context.run_dir, context.index, url)
                await context.announce(url)
                await asyncio.Event().wait()


@asynccontextmanager
async def _prefills(context: EngineContext, config: VllmConfig) -> AsyncIterator[Prefills | None]:
    """Those that this engine leaves its prompts to."""
    if config.kind_of(context.index) != "decode":
        yield None
        return
    prefill = config.prefill
    prefills = Prefills(context.run_dir, prefill.count, token=context.token, patience=prefill.patience)
    try:
        yield prefills
    finally:
        await prefills.aclose()


@asynccontextmanager
async def _server(
    context: EngineContext, config: VllmConfig, described: Described
) -> AsyncIterator[tuple[VllmApi, Sequence[Ends]]]:
    """The server of this engine, started or joined, and what raises when it ends, or a part of it does."""
    if config.servers:
        api = VllmApi(config.servers[context.index], key=os.environ.get(KEY_VARIABLE, ""))
        try:
            yield api, [partial(_watched, api, config.servers[context.index])]
        finally:
            await api.aclose()
        return
    run = context.composition.run
    cpu = vllm.on_cpu(run)
    length = config.length or run.rollouts.sequence_length
    # One for all engines: servers that hand keys and values to each other compare its name.
    folder = context.run_dir.path / "engines" / "model"
    model_files.write(described, folder, length=length, cpu=cpu)
    route_bytes = described.route_bytes(replayed(context.composition))
    if route_bytes and config.kv_tiers.host_bytes and not cpu and not release.keeps_routes_by_slot():
        raise UserError(
            f"engine.kv_tiers: on GPUs vLLM {release.installed()} forgets the routes of what its tiers keep, and ends "
            "when it finds it again; install a release from 0.26 to 0.29, leave engine.kv_tiers out, or set "
            'trainer.router_replay = "off"'
        )
    async with AsyncExitStack() as stack:
        identity = stack.enter_context(_identity(context))
        values = vllm.arguments(
            run, config, described, model=folder, cpu=cpu, route_bytes=route_bytes, identity=identity
        )
        address = network.address(run)
        exchange = (address, network.free_port(address)) if config.prefill.count else None
        environment = vllm.environment(config, cpu=cpu, routes=bool(route_bytes), exchange=exchange)
        ends: list[Ends] = []
        if config.spans > 1:
            meeting = await stack.enter_async_context(spanning.meeting(context))
            values |= spanning.arguments(config.parallel, 0, meeting)
            environment |= spanning.environment(meeting.address)
            ends.append(partial(spanning.deserted, context, meeting))
        server = await stack.enter_async_context(
            started([*vllm.command_line(values)], environment, startup=config.startup)
        )
        yield server.api, [server.ended, *ends]


@contextmanager
def _identity(context: EngineContext) -> Iterator[str]:
    """A name for this server among those that share keys and values, new with each start.

    vLLM's host memory for them is a file of that name: what a server that was killed left behind is removed first.
    """
    engine = f"prl-{zlib.crc32(str(context.run_dir.path).encode()):08x}-{context.index}-"

    def clear() -> None:
        for file in Path("/dev/shm").glob(f"vllm_offload_{engine}*"):
            file.unlink(missing_ok=True)

    clear()
    try:
        yield engine + secrets.token_hex(4)
    finally:
        clear()


def _checksums(engine: Engine) -> Handler:
    async def answer(http: web.Request) -> web.Response:
        return web.json_response(await engine.read_back())

    return answer


async def _watched(api: VllmApi, url: str) -> None:
    while await api.healthy():
        await asyncio.sleep(HEALTH_SECONDS)
    raise InfrastructureError(f"the vLLM server at {url} is not healthy any more")


async def _broken(engine: Engine) -> None:
    await engine.broken


async def _expect_extension(api: VllmApi) -> Mapping[str, Any]:
    """What the server says of itself. A joined one may be any: it must bring prl's extension, of this kind."""
    try:
        (described, *_) = await api.call("prl_describe")
    except InfrastructureError as error:
        raise InfrastructureError(
            f"this vLLM server is not one a run can use ({error}); start it as docs/vllm.md says, with "
            f"PRL_VLLM=1 VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls {vllm.EXTENSION}"
        ) from error
    if described["protocol"] != PROTOCOL:
        raise InfrastructureError(
            f"this vLLM server speaks protocol {described['protocol']} of prl's extension, this engine {PROTOCOL}; "
            "start it with the same release of prl"
        )
    return cast(Mapping[str, Any], described)
