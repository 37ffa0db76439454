"""The endpoints of the controller and of whoever watches: weights, pause, abort, statistics, metrics, health."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack  # type: ignore[import-untyped]
from aiohttp import web

from prl import wire
from prl.serve import body
from prl.serve.engine import Engine
from prl.serve.metrics import exposition
from prl.serve.refusal import RefusedError
from prl.types import Manifest

_MAX_VERSION = (1 << 31) - 1


class ControlEndpoints:
    """Every answer is JSON, metrics excepted."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def health(self, http: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def statistics(self, http: web.Request) -> web.Response:
        return web.json_response(await self._engine.statistics())

    async def metrics(self, http: web.Request) -> web.Response:
        return web.Response(text=exposition(await self._engine.statistics()))

    async def pause(self, http: web.Request) -> web.Response:
        await self._engine.pause()
        return web.json_response({"paused": True})

    async def resume(self, http: web.Request) -> web.Response:
        await self._engine.resume()
        return web.json_response({"paused": False})

    async def abort(self, http: web.Request) -> web.Response:
        fields = await body.read(http)
        request_id = fields.text("request_id")
        fields.finish()
        return web.json_response({"aborted": await self._engine.abort(request_id)})

    async def prepare(self, http: web.Request) -> web.Response:
        manifest = _manifest((await body.read(http)).rest())
        await self._engine.prepare(manifest)
        return web.json_response({"prepared": manifest.version})

    async def commit(self, http: web.Request) -> web.Response:
        fields = await body.read(http)
        version = fields.integer("version", low=0, high=_MAX_VERSION)
        fields.finish()
        await self._engine.commit(version)
        return web.json_response({"version": version})


def _manifest(fields: Mapping[str, Any]) -> Manifest:
    """A manifest from JSON, as strictly as from any wire."""
    try:
        manifest: Manifest = wire.decode([msgpack.packb([Manifest.__name__, fields])], (Manifest,))
    except (wire.WireError, OverflowError) as error:
        raise RefusedError(400, str(error)) from None
    return manifest
