"""An engine that is none of prl's, behind prl's endpoints, talked to with prl's client and with OpenAI's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from prl.compose.compose import compose
from prl.errors import InfrastructureError
from prl.serve.client import HttpEngineClient, connect
from prl.types import Manifest, Sampling
from prl.weights.engines import EngineContext

from tests.serve.parrot import serve

CONFIG = Path(__file__).parents[2] / "configs" / "spell_backward.toml"
TOKEN = "the run's token"


def talking(test: Callable[[HttpEngineClient, str], Awaitable[None]]) -> None:
    """Serve a parrot as a run would, and talk to it."""
    composition = compose(CONFIG)

    async def run() -> None:
        announced: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def announce(url: str) -> None:
            announced.set_result(url)

        fields: dict[str, Any] = {"run_dir": None, "receiver": None, "index": 0}
        context = EngineContext(composition=composition, host="127.0.0.1", token=TOKEN, announce=announce, **fields)
        serving = asyncio.create_task(serve(context))
        client = connect(await announced, TOKEN)
        try:
            await test(client, announced.result())
        finally:
            await client.aclose()
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    asyncio.run(run())


async def publish(client: HttpEngineClient, version: int) -> None:
    await client.prepare(Manifest.single(version=version, location="nowhere", tensors=()))
    await client.commit(version)


def test_tokens_versions_and_statistics_reach_the_client() -> None:
    async def test(client: HttpEngineClient, url: str) -> None:
        with pytest.raises(InfrastructureError, match="503: no weights were committed yet"):
            await client.generate([4, 5, 6], Sampling(), stop=[])
        await publish(client, 3)
        completions = await client.generate([4, 5, 6], Sampling(max_tokens=2), stop=[], n=2)
        assert [c.tokens.tolist() for c in completions] == [[4, 5], [4, 5]]
        assert [c.versions.tolist() for c in completions] == [[3, 3], [3, 3]]
        assert completions[0].logprobs.dtype == np.float32
        statistics = await client.statistics()
        assert (statistics["version"], statistics["generated_tokens"]) == (3, 4)

    talking(test)


def test_what_the_engine_refuses_reaches_the_client() -> None:
    async def test(client: HttpEngineClient, url: str) -> None:
        with pytest.raises(InfrastructureError, match="409: version 8 was not prepared"):
            await client.commit(8)

    talking(test)


def test_openais_client_talks_to_it() -> None:
    async def test(client: HttpEngineClient, url: str) -> None:
        await publish(client, 0)
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key=TOKEN, max_retries=0) as openais:
            ask: dict[str, Any] = {"model": "qwen3", "messages": [{"role": "user", "content": "sun"}]}
            whole = await openais.chat.completions.create(**ask)
            pieces = [piece async for piece in await openais.chat.completions.create(**ask, stream=True)]
        said = whole.choices[0].message.content
        assert said is not None
        assert "sun" in said
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == said

    talking(test)
