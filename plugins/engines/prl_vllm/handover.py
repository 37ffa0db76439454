"""A prompt computed by one engine and continued by another.

    decoding engine ── /prefill ──► an engine that computes prompts ──► its vLLM computes this one, and keeps it
                    ◄── where its keys and values lie, and its routes
                    ──► own vLLM: one request that fetches them into its prefix cache         (engine.py)
                    ──► own vLLM: the request itself, which finds its prompt there

Both engines must serve the same weights from the first to the last of these steps; what an update interrupts is thrown
away and computed by the engine that decodes, as is everything when no other engine answers. What was computed is kept
until it is fetched, whatever is served meanwhile, or somebody says that nobody will fetch it, or its lease is over. Who
calls an engine knows nothing of all this. The address of an engine that computes prompts is in the run directory.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import attrs
from aiohttp import web
from prl.errors import InfrastructureError
from prl.run_dir import RunDir, read_json
from prl.serve import body
from prl.serve.columns import MEDIA_TYPE, pack, unpack
from prl.serve.refusal import sentence_in
from prl.serve.requests import checked
from prl.types import Routes, Sampling

from prl_vllm.api import Answer, Ask

if TYPE_CHECKING:
    from prl_vllm.engine import Engine

log = logging.getLogger(__name__)

PATH = "/prefill"
RELEASE = "/prefill/release"
CONNECT_SECONDS = 5.0
REST_SECONDS = 5.0
"""An engine that failed is left alone so long."""
ONE_TOKEN = Sampling(temperature=0.0, max_tokens=1, min_tokens=0, seed=0)
"""vLLM computes a prompt in order to sample: the token is thrown away."""
TO_BE_FETCHED = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""Tells vLLM's connectors to keep a prompt until another server has fetched it."""


@attrs.frozen(kw_only=True)
class Handed:
    """A computed prompt."""

    transfer: str
    """JSON for the vLLM that fetches its keys and values."""
    routes: Routes | None
    """Of its tokens, where they were asked for."""
    server: int = -1
    """Index of the engine that keeps it, as who asked knows it."""


# --- the side that decodes --------------------------------------------------------------------------------------------
@attrs.define(eq=False)
class _Server:
    index: int
    rests_until: float = 0.0


class Prefills:
    """The engines of a run that compute prompts, asked by one that decodes."""

    def __init__(self, run_dir: RunDir, count: int, *, token: str, patience: float) -> None:
        self.patience = patience
        """Seconds that each of the steps may take."""
        self.prompts = 0
        """Computed elsewhere and fetched."""
        self.tokens = 0
        self._run_dir = run_dir
        self._token = token
        self._servers = [_Server(index) for index in range(count)]
        self._session: aiohttp.ClientSession | None = None

    async def compute(self, ask: Ask, mark: str, *, session: str) -> Handed | None:
        """The prompt of `ask`, computed under the weights `mark`; None when no engine does it.

        Turns of a session go to one engine, as does what asks the same, as long as it answers: it may have computed
        a part of it before.
        """
        prompt = list(ask.prompt)
        key = session or blake2b(json.dumps(prompt).encode()).hexdigest()
        question = {
            "request_id": ask.request_id,
            "token_ids": prompt,
            "mark": mark,
            "routes_from": ask.routes_from,
        }
        for server in sorted(self._servers, key=lambda server: _rank(key, server.index)):
            if server.rests_until > time.monotonic():
                continue
            try:
                return await self._ask(server, question)
            except _OtherWeightsError:
                continue  # for a moment, while an update goes through the engines
            except InfrastructureError as error:
                log.warning("engine %d computes no prompts for %.0f s: %s", server.index, REST_SECONDS, error)
                server.rests_until = time.monotonic() + REST_SECONDS
        return None

    async def _ask(self, server: _Server, question: dict[str, Any]) -> Handed:
        return attrs.evolve(unpack(await self._post(server.index, PATH, question), Handed), server=server.index)

    async def give_up(self, handed: Handed) -> None:
        """Tell the engine that keeps a prompt that it will not be fetched; where that fails, its lease ends."""
        try:
            await self._post(handed.server, RELEASE, {"kept": json.loads(handed.transfer)["remote_request_id"]})
        except InfrastructureError as error:
            log.warning("engine %d keeps a prompt that nobody wants: %s", handed.server, error)

    async def _post(self, index: int, path: str, question: dict[str, Any]) -> bytes:
        found = read_json(_address(self._run_dir, index))
        if found is None:
            raise InfrastructureError("it has not said where it listens")
        url = found["url"] + path
        try:
            async with asyncio.timeout(self.patience), self._open().post(url, json=question) as response:
                answer = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise InfrastructureError(f"{url} does not answer: {type(error).__name__}: {error}") from error
        if response.status == 409:
            raise _OtherWeightsError
        if response.status != 200:
            raise InfrastructureError(f"{url} answered {response.status}: {sentence_in(answer)}")
        return answer

    async def within_patience(self, fetching: Awaitable[Answer]) -> bool:
        """Whether vLLM has fetched a prompt; what takes longer is aborted, before the prompt is given up elsewhere."""
        try:
            async with asyncio.timeout(self.patience):
                answer = await fetching
        except (InfrastructureError, TimeoutError) as error:
            log.warning("a computed prompt could not be fetched: %s", str(error) or type(error).__name__)
            return False
        self.prompts += 1
        self.tokens += answer.prompt_tokens
        return True

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers={"Authorization": f"Bearer {self._token}"},
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
                connector=aiohttp.TCPConnector(limit=0),
            )
        return self._session

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()


class _OtherWeightsError(InfrastructureError):
    """It serves another version, just now."""


def _rank(key: str, index: int) -> bytes:
    """Rendezvous hashing: when an engine is lost, what others are asked does not change."""
    return blake2b(f"{index} {key}".encode(), digest_size=8).digest()


# --- the side that computes prompts -----------------------------------------------------------------------------------
def announce(run_dir: RunDir, index: int, url: str) -> None:
    """Tell the engines that decode where this one listens."""
    path = _address(run_dir, index)
    path.parent.mkdir(parents=True, exist_ok=True)
    run_dir.write_json(path, {"url": url})


def _address(run_dir: RunDir, index: int) -> Path:
    return run_dir.path / "engines" / f"prefill-{index}.json"


class PrefillEndpoint:
    """`POST /prefill` and `POST /prefill/release`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def prefill(self, http: web.Request) -> web.Response:
        engine = self._engine
        fields = await body.read(http)
        request = checked(
            engine,
            fields.integers("token_ids", below=engine.vocab_size, most=engine.length),
            ONE_TOKEN,
            n=1,
            stop=(),
            request_id=fields.text("request_id"),
            routes_from=fields.integer("routes_from", low=0, high=engine.length) if fields.has("routes_from") else None,
        )
        mark = fields.text("mark")
        fields.finish()
        return web.Response(body=pack(await engine.prefill(request, mark)), content_type=MEDIA_TYPE)

    async def release(self, http: web.Request) -> web.Response:
        fields = await body.read(http)
        kept = fields.text("kept")
        fields.finish()
        await self._engine.release(kept)
        return web.json_response({})
