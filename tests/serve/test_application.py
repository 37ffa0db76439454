"""The endpoints of every engine, before the embedded one: who may ask, what is refused, what the answers look like."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from prl.errors import InfrastructureError
from prl.serve.client import connect
from prl.types import Sampling

from tests.plugins.served_engine import TOKEN, Served, serving

PROMPT = [2, 3, 4]


def served(folder: Path, test: Callable[[Served], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with serving(folder, **options) as engine:
            await test(engine)

    asyncio.run(run())


async def ask(
    engine: Served, method: str, path: str, body: Any = None, *, token: str | None = TOKEN, **more: Any
) -> tuple[int, Any]:
    """Status and JSON of one HTTP request."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.request(method, engine.url + path, json=body, **more) as response,
    ):
        return response.status, await response.json()


def test_json_answers_have_the_shape_of_vllms(tmp_path: Path) -> None:
    async def test(engine: Served) -> None:
        params = {"temperature": 0.0, "max_tokens": 4, "logprobs": 0, "stop_token_ids": []}
        body = {"token_ids": PROMPT, "sampling_params": params, "request_id": "mine"}
        status, answer = await ask(engine, "POST", "/inference/v1/generate", body)
        (choice,) = answer["choices"]
        pairs = choice["logprobs"]["content"]
        assert (status, answer["request_id"], choice["index"], choice["finish_reason"]) == (200, "mine", 0, "length")
        assert choice["weight_versions"] == [{"version": 0, "start": 0, "end": 4}]
        assert [pair["token_id"] for pair in pairs] == choice["token_ids"]
        (completion,) = await engine.client.generate(PROMPT, Sampling(temperature=0.0, max_tokens=4), stop=[])
        assert completion.tokens.tolist() == choice["token_ids"]
        np.testing.assert_allclose([pair["logprob"] for pair in pairs], completion.logprobs, atol=1e-6)
        assert answer["usage"]["prompt_tokens"] == 3

    served(tmp_path, test)


def test_everything_but_health_wants_the_token(tmp_path: Path) -> None:
    async def test(engine: Served) -> None:
        gets = ("/v1/models", "/statistics", "/metrics")
        posts = ("/inference/v1/generate", "/v1/chat/completions", "/pause", "/resume", "/abort", "/nowhere")
        for token in (None, "wrong", TOKEN + "x"):
            for method, path in [*(("GET", p) for p in gets), *(("POST", p) for p in posts)]:
                status, answer = await ask(engine, method, path, token=token)
                assert (status, "run's token" in answer["error"]["message"]) == (401, True), path
        assert await ask(engine, "GET", "/health", token=None) == (200, {"status": "ok"})
        with pytest.raises(InfrastructureError, match=r"/statistics answered 401: send the run's token"):
            await connect(engine.url, "wrong").statistics()

    served(tmp_path, test)


BAD = {
    "token_ids is missing": {"sampling_params": {}},
    "token_ids must be a list": {"token_ids": "abc"},
    "token_ids[1] must be an integer from 0 to 39, got int 40": {"token_ids": [1, 40]},
    "token_ids[0] must be an integer from 0 to 39, got float 1.0": {"token_ids": [1.0]},
    "the prompt has 0 tokens": {"token_ids": []},
    "the prompt has 256 tokens": {"token_ids": [2] * 256},
    "sampling_params must be a JSON object": {"token_ids": [1], "sampling_params": 7},
    "sampling_params.temperature must be a number from 0 to 100, got int -1": {"sampling_params": {"temperature": -1}},
    "temperature 0.0001 must be 0 or at least 0.001": {"token_ids": [1], "sampling_params": {"temperature": 1e-4}},
    "sampling_params.max_tokens must be an integer from 1": {"sampling_params": {"max_tokens": 0}},
    "min_tokens 5 is more than max_tokens 4": {"token_ids": [1], "sampling_params": {"min_tokens": 5, "max_tokens": 4}},
    "sampling_params.top_p is not supported": {"sampling_params": {"top_p": 0.9}},
    "sampling_params.n must be an integer from 1": {"sampling_params": {"n": True}},
    "sampling_params.logprobs must be an integer from 0 to 0, got int 5": {"sampling_params": {"logprobs": 5}},
    "sampling_params.stop_token_ids must be a list": {"sampling_params": {"stop_token_ids": [1] * 17}},
    "session must be a string": {"token_ids": [1], "session": 3},
    "priority is not supported": {"token_ids": [1], "priority": 3},
    "the body must be a JSON object, got list": [1, 2],
}


def test_malformed_requests_are_refused_with_a_sentence(tmp_path: Path) -> None:
    async def test(engine: Served) -> None:
        for sentence, body in BAD.items():
            status, answer = await ask(engine, "POST", "/inference/v1/generate", body)
            assert status == 400
            assert answer["error"]["message"].startswith(sentence)
        status, answer = await ask(engine, "POST", "/weights/commit", {"version": "1"})
        assert (status, answer["error"]["message"][:30]) == (400, "version must be an integer fro")
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.post(engine.url + "/abort", data=b"{not json") as response,
        ):
            assert response.status == 400
            assert (await response.json())["error"]["message"].startswith("the body is not JSON")
        with pytest.raises(InfrastructureError, match=r"answered 400: the prompt has 256 tokens"):
            await engine.client.generate([2] * 256, Sampling(), stop=[])

    served(tmp_path, test)


def test_an_engine_that_is_not_there_is_an_infrastructure_failure() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(InfrastructureError, match=f"{url}/inference/v1/generate does not answer"):
        asyncio.run(connect(url, TOKEN).generate(PROMPT, Sampling(), stop=[]))


def test_metrics_are_prometheus_text(tmp_path: Path) -> None:
    async def test(engine: Served) -> None:
        for _ in range(2):
            await engine.client.generate(PROMPT, Sampling(max_tokens=6), stop=[])
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.get(engine.url + "/metrics") as response,
        ):
            lines = (await response.text()).splitlines()
        values = dict(line.split() for line in lines if not line.startswith("#"))
        assert (values["prl_engine_generated_tokens_total"], values["prl_engine_prompt_tokens_total"]) == ("12", "6")
        assert (values["prl_engine_prefix_hit_tokens_total"], values["prl_engine_version"]) == ("2", "0")
        assert float(values["prl_engine_busy_seconds_total"]) > 0
        assert "# TYPE prl_engine_running gauge" in lines

    served(tmp_path, test)
