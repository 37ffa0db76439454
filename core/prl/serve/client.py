"""An engine's client: environment workers generate with it, the controller updates weights with it.

No torch here. `generate` has no deadline of its own: whoever waits cancels, and the engine then aborts the request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import attrs

from prl.errors import InfrastructureError
from prl.serve.columns import MEDIA_TYPE, Completions, unpack
from prl.serve.refusal import sentence_in
from prl.types import Completion, Manifest, Sampling

CONNECT_SECONDS = 10.0


class HttpEngineClient:
    """One keep-alive HTTP session to one engine, opened with the first request."""

    def __init__(self, url: str, token: str) -> None:
        self._url = url
        self._token = token
        self._session: aiohttp.ClientSession | None = None

    async def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        stop: Sequence[int],
        n: int = 1,
        session: str = "",
        routes_from: int | None = None,
        request_id: str = "",
    ) -> list[Completion]:
        body = {
            "token_ids": [int(token) for token in prompt],
            "sampling_params": {**attrs.asdict(sampling), "n": n, "stop_token_ids": [int(token) for token in stop]},
            "session": session,
            "routes_from": routes_from,
            "request_id": request_id,
        }
        answer = await self._request("POST", "/inference/v1/generate", body, accept=MEDIA_TYPE)
        return list(unpack(answer, Completions).completions)

    async def so_far(self, request_id: str) -> list[Completion]:
        body = {"request_id": request_id}
        answer = await self._request("POST", "/inference/v1/so_far", body, accept=MEDIA_TYPE)
        return list(unpack(answer, Completions).completions)

    async def prepare(self, manifest: Manifest) -> None:
        await self._request("POST", "/weights/prepare", attrs.asdict(manifest))

    async def commit(self, version: int) -> None:
        await self._request("POST", "/weights/commit", {"version": version})

    async def pause(self) -> None:
        await self._request("POST", "/pause")

    async def resume(self) -> None:
        await self._request("POST", "/resume")

    async def statistics(self) -> Mapping[str, float]:
        statistics: dict[str, float] = json.loads(await self._request("GET", "/statistics"))
        return statistics

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _request(self, method: str, path: str, body: Any = None, *, accept: str = "application/json") -> bytes:
        """The body of a 200; InfrastructureError with the URL and the reason for everything else."""
        url = self._url + path
        try:
            async with self._open().request(method, url, json=body, headers={"Accept": accept}) as response:
                answer = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise InfrastructureError(f"{url} does not answer: {type(error).__name__}: {error}") from error
        if response.status != 200:
            raise InfrastructureError(f"{url} answered {response.status}: {sentence_in(answer)}")
        return answer

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers={"Authorization": f"Bearer {self._token}"},
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
                connector=aiohttp.TCPConnector(limit=0),
            )
        return self._session


def connect(url: str, token: str) -> HttpEngineClient:
    """A client of the engine at `url`; nothing is sent yet."""
    return HttpEngineClient(url, token)
