"""The engine process: builds the model, starts its thread, serves HTTP.

    main thread      event loop: HTTP and control            (this module, engine.py, the endpoints)
    model's thread   continuous batching                     (generation.py, scheduler.py, batch.py)
    worker threads   fetch and verify the next weights       (weights.py)

Every endpoint but /health wants the run's token. Called by `prl.weights.engines`.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast

import torch
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from prl.compose.routing import replayed

from prl_torch_engine import TorchEngineConfig
from prl_torch_engine.chat import ChatEndpoint
from prl_torch_engine.control import ControlEndpoints
from prl_torch_engine.engine import Engine
from prl_torch_engine.generate import GenerateEndpoint
from prl_torch_engine.generation import Generation
from prl_torch_engine.loading import Loaded, load
from prl_torch_engine.refusal import RefusedError
from prl_torch_engine.scheduler import Scheduler
from prl_torch_engine.weights import Weights

if TYPE_CHECKING:
    from prl.compose.config import Run
    from prl.weights.engines import EngineContext

MAX_BODY_BYTES = 64 << 20
PUBLIC = ("/health",)


async def serve(context: EngineContext) -> None:
    """Announce the engine once it listens, and serve until cancelled or until the model fails."""
    run = context.composition.run
    config = cast(TorchEngineConfig, run.engine)
    torch.set_num_threads(config.threads)
    loaded = await asyncio.to_thread(load, context.composition)
    scheduler = Scheduler(
        loaded.model,
        sequences=config.sequences,
        retained=config.retained,
        length=config.length or run.rollouts.sequence_length,
        prefill_tokens=config.prefill_tokens,
        batch_invariant=batch_invariant(config, run),
        routing=replayed(context.composition),
    )
    weights = Weights(loaded.module, loaded.weight_map, context.receiver, number_format=loaded.number_format)
    generation = Generation(scheduler)
    engine = Engine(scheduler, generation, weights, vocab_size=len(loaded.model.head()))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(asyncio.to_thread(generation.run))
        try:
            async with listening(application(engine, loaded, context.token), context.host) as url:
                await context.announce(url)
                await asyncio.Event().wait()
        finally:
            generation.stop()


def batch_invariant(config: TorchEngineConfig, run: Run) -> bool:
    """A scheduler without a field for the bound may leave the bound open."""
    if config.batch_invariant == "auto":
        return getattr(run.scheduler, "max_staleness", None) == 0
    return config.batch_invariant == "on"


def application(engine: Engine, loaded: Loaded, token: str) -> web.Application:
    """Every route, behind the token."""
    generate = GenerateEndpoint(engine)
    chat = ChatEndpoint(engine, loaded.tokenizer, loaded.renderer, model=loaded.name)
    control = ControlEndpoints(engine)
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_explain, _authenticate(token)])
    app.add_routes(
        [
            web.post("/inference/v1/generate", generate.generate),
            web.post("/v1/chat/completions", chat.chat),
            web.get("/v1/models", chat.models),
            web.get("/health", control.health),
            web.get("/statistics", control.statistics),
            web.get("/metrics", control.metrics),
            web.post("/pause", control.pause),
            web.post("/resume", control.resume),
            web.post("/abort", control.abort),
            web.post("/weights/prepare", control.prepare),
            web.post("/weights/commit", control.commit),
        ]
    )
    return app


@asynccontextmanager
async def listening(app: web.Application, host: str) -> AsyncIterator[str]:
    """Serve `app` on a free port of `host`; the URL at which others reach it."""
    # A client that goes away cancels its handler, which aborts what it asked for.
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, 0).start()
        port = runner.addresses[0][1]
        reachable = socket.gethostname() if host == "0.0.0.0" else host
        yield f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
    finally:
        await runner.cleanup()


@web.middleware
async def _explain(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refusals, and what aiohttp refuses by itself, as JSON with a sentence."""
    try:
        return await handler(request)
    except RefusedError as refusal:
        answer = refusal
    except web.HTTPException as error:
        answer = RefusedError(error.status, f"{request.method} {request.path}: {error.reason}")
    return web.json_response(answer.body(), status=answer.status)


def _authenticate(token: str) -> Middleware:
    expected = f"Bearer {token}".encode()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        if request.path not in PUBLIC and not hmac.compare_digest(given, expected):
            raise RefusedError(401, "send the run's token in the header 'Authorization: Bearer <token>'")
        return await handler(request)

    return check
