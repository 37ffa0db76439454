"""The embedded engine over HTTP: what its client gets, before weights, while paused, after an abort."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from prl.errors import InfrastructureError
from prl.serve.metrics import STATISTICS
from prl.types import Sampling, StopReason

from tests.plugins.served_engine import TOKEN, Served, serving
from tests.plugins.tiny_engine import chosen, finish, reference_logprobs, request, scheduler, tiny_model

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


def test_the_client_gets_the_tokens_of_the_model(tmp_path: Path) -> None:
    async def test(engine: Served) -> None:
        sampling = Sampling(max_tokens=10, seed=5)
        completions = await engine.client.generate(PROMPT, sampling, stop=[1], n=3)
        (expected,) = finish(scheduler(), request("r", PROMPT, n=3, stop=(1,), max_tokens=10, seed=5)).values()
        for seen, alone in zip(completions, expected.completions, strict=True):
            assert seen.tokens.tolist() == alone.tokens.tolist()
            np.testing.assert_allclose(seen.logprobs, alone.logprobs, atol=1e-5)
            assert seen.versions.tolist() == [0] * len(seen.tokens)
            assert seen.stop is alone.stop

    served(tmp_path, test)


def test_nothing_is_generated_before_the_first_weights(tmp_path: Path) -> None:
    async def test(engine: Served) -> None:
        with pytest.raises(InfrastructureError, match="answered 503: no weights were committed yet"):
            await engine.client.generate(PROMPT, Sampling(), stop=[])
        assert (await engine.client.statistics())["version"] == -1
        await engine.update(7, tiny_model())
        (completion,) = await engine.client.generate(PROMPT, Sampling(max_tokens=3), stop=[])
        assert completion.versions.tolist() == [7] * 3

    served(tmp_path, test, empty=True)


def test_statistics_are_those_of_every_engine(tmp_path: Path) -> None:
    async def test(engine: Served) -> None:
        idle = await engine.client.statistics()
        assert idle.keys() <= STATISTICS.keys()
        assert (idle["sequences"], idle["length"], idle["kv_tokens"]) == (8, 256, 8 * 256)
        assert (idle["kv_usage"], idle["preemptions"]) == (0, 0)
        asking = asyncio.ensure_future(engine.client.generate(PROMPT, Sampling(max_tokens=200), stop=[], n=2))
        await engine.until("generated_tokens", 40)
        await engine.client.pause()
        held = await engine.client.statistics()
        tokens = 2 * len(PROMPT) + held["generated_tokens"] - 2  # the newest of each is not computed with yet
        assert held["kv_usage"] == tokens / (16 * 256)  # 8 rows that decode, 8 that keep prompts
        await engine.client.resume()
        await asking

    served(tmp_path, test)


def test_paused_requests_are_kept(tmp_path: Path) -> None:
    async def test(engine: Served) -> None:
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(engine.client.generate(PROMPT, Sampling(max_tokens=200), stop=[]))
            await engine.until("generated_tokens", 5)
            await engine.client.pause()
            late = tasks.create_task(engine.client.generate([9, 9], Sampling(max_tokens=3), stop=[]))
            await engine.until("waiting", 1)
            before = await engine.client.statistics()
            assert (before["paused"], before["running"]) == (1, 1)
            assert (await engine.client.statistics())["generated_tokens"] == before["generated_tokens"] < 200
            await engine.client.resume()
        (completion,) = running.result()
        rows = reference_logprobs(tiny_model(), PROMPT, completion)
        np.testing.assert_allclose(completion.logprobs, chosen(rows, completion), atol=1e-5)
        assert len(late.result()[0].tokens) == 3

    served(tmp_path, test)


def test_abort_returns_what_there_is(tmp_path: Path) -> None:
    async def test(engine: Served) -> None:
        body = {"token_ids": PROMPT, "sampling_params": {"max_tokens": 250}, "request_id": "long"}
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(ask(engine, "POST", "/inference/v1/generate", body))
            await engine.until("running", 1)
            await engine.client.pause()
            assert await ask(engine, "POST", "/abort", {"request_id": "long"}) == (200, {"aborted": True})
            assert await ask(engine, "POST", "/abort", {"request_id": "long"}) == (200, {"aborted": False})
        _, answer = running.result()
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == StopReason.ABORT.value
        assert 0 < len(choice["token_ids"]) < 250

    served(tmp_path, test)


def test_what_a_request_has_is_told_before_it_is_answered(tmp_path: Path) -> None:
    async def test(engine: Served) -> None:
        ask_for = Sampling(max_tokens=250)
        asking = asyncio.ensure_future(engine.client.generate(PROMPT, ask_for, stop=[], n=2, request_id="long"))
        await engine.until("running", 2)
        await engine.client.pause()
        so_far = await engine.client.so_far("long")
        assert await engine.client.so_far("another") == []
        await engine.client.resume()
        for begun, whole in zip(so_far, await asking, strict=True):
            assert begun.stop is StopReason.ABORT
            assert begun.tokens.tolist() == whole.tokens[: len(begun.tokens)].tolist()
            assert 0 < len(begun.tokens) < len(whole.tokens) == 250

    served(tmp_path, test)


def test_a_client_that_goes_away_frees_its_rows(tmp_path: Path) -> None:
    async def test(engine: Served) -> None:
        asking = asyncio.ensure_future(engine.client.generate(PROMPT, Sampling(max_tokens=250), stop=[], n=20))
        await engine.until("waiting", 1)
        await engine.client.pause()
        asking.cancel()
        async with asyncio.timeout(60):
            while (statistics := await engine.client.statistics())["running"] + statistics["waiting"]:
                pass
        await engine.client.resume()
        (completion,) = await engine.client.generate(PROMPT, Sampling(max_tokens=2), stop=[])
        assert len(completion.tokens) == 2

    served(tmp_path, test)
