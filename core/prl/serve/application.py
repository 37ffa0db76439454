"""The routes of an engine, and where it listens. Every endpoint but /health wants the run's token."""

from __future__ import annotations

import hmac
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from prl.serve.chat import ChatEndpoint
from prl.serve.control import ControlEndpoints
from prl.serve.engine import Engine
from prl.serve.generate import GenerateEndpoint
from prl.serve.refusal import RefusedError
from prl.serve.speech import Speech

MAX_BODY_BYTES = 64 << 20
PUBLIC = ("/health",)


def application(engine: Engine, speech: Speech, token: str) -> web.Application:
    """Every route, behind the token."""
    generate = GenerateEndpoint(engine)
    chat = ChatEndpoint(engine, speech)
    control = ControlEndpoints(engine)
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_explain, _authenticate(token)])
    app.add_routes(
        [
            web.post("/inference/v1/generate", generate.generate),
            web.post("/inference/v1/so_far", generate.so_far),
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
