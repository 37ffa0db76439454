"""Prompts computed by one engine and continued by another, tiers behind both caches, and the experts of every token.

A run with an engine of each kind, whose caches are so small that most of what they reuse comes from host memory or
disk. The one that computes prompts is a plain server to who asks it directly: hand-over must not change what it says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import attrs
import numpy as np
import pytest
from prl.types import Completion, Manifest, Sampling

from tests.plugins.served_vllm import Served, fleet, needs_vllm

pytestmark = needs_vllm

EXPERTS = ("model.layers=2", "model.experts=8", "model.experts_per_token=2", "model.expert_intermediate_size=64")
BLOCK = 128
"""Tokens of a block of the cache."""
BLOCK_BYTES = 128 << 10
SMALL = 12 * BLOCK_BYTES


@attrs.frozen(kw_only=True)
class Job:
    prefill: Served
    decode: Served

    def publish(self, version: int, seed: int) -> None:
        manifest = self.changed(version, seed)
        for engine in (self.prefill, self.decode):
            engine.run(engine.serve(manifest))

    def changed(self, version: int, seed: int) -> Manifest:
        """New weights, which no engine serves yet."""
        self.decode.trainer.change(seed)
        return self.decode.trainer.send(version)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    folder = tmp_path_factory.mktemp("vllm")
    edits = (
        "engine.length=1024",
        'weights.type="disk"',
        'trainer.router_replay="on"',
        *EXPERTS,
        "engine.count=2",
        "engine.prefill.count=1",
        "engine.prefill.patience=90",
        f"engine.kv_cache_bytes={SMALL}",
        f"engine.kv_tiers.host_bytes={SMALL}",
        f'engine.kv_tiers.disk="{folder / "kv"}"',
    )
    with fleet(folder / "run", *edits, plugins="vllm,disk") as (prefill, decode):
        started = Job(prefill=prefill, decode=decode)
        started.publish(0, seed=1)
        yield started


@pytest.fixture
def version(job: Job) -> int:
    """The version being served."""
    return int(job.prefill.statistics()["version"])


def greedy(engine: Served, prompt: list[int], *, length: int = 12, routes_from: int = 0) -> Completion:
    (completion,) = engine.routed(prompt, routes_from=routes_from, temperature=0.0, max_tokens=length)
    return completion


def assert_same(one: Completion, other: Completion) -> None:
    """Tokens, logprobs and the experts of every token of prompt and completion, each with its version."""
    assert one.tokens.tolist() == other.tokens.tolist()
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    assert one.routes is not None
    assert other.routes is not None
    assert one.routes.start == other.routes.start
    assert one.routes.versions.tolist() == other.routes.versions.tolist()
    assert one.routes.versions.min() >= 0
    np.testing.assert_array_equal(np.sort(one.routes.experts, 2), np.sort(other.routes.experts, 2))


# --- handed over ------------------------------------------------------------------------------------------------------
def test_what_is_handed_over_continues_as_in_one_plain_server(job: Job, version: int) -> None:
    before = job.decode.statistics()
    prompts = job.decode.prompts(300, 20, 130, 256, seed=1)
    for prompt in prompts:
        handed = greedy(job.decode, prompt)
        assert_same(handed, greedy(job.prefill, prompt))
        np.testing.assert_allclose(handed.logprobs, job.decode.trainer.logprobs(prompt, handed), atol=1e-4)
        assert handed.routes is not None
        assert len(handed.routes.versions) == len(prompt) + 12 - 1
        assert set(handed.routes.versions.tolist()) == {version}
    after = job.decode.statistics()
    assert after["handed_tokens"] - before["handed_tokens"] == sum(map(len, prompts))
    assert after["outside_hit_tokens"] - before["outside_hit_tokens"] >= 300 - 1
    assert after["fetched_bytes"] - before["fetched_bytes"] >= 2 * BLOCK_BYTES


def test_siblings_share_one_fetched_prompt(job: Job) -> None:
    (prompt,) = job.decode.prompts(300, seed=2)
    before = job.decode.statistics()["handed_tokens"]
    handed = job.decode.routed(prompt, n=4, max_tokens=6, seed=5)
    assert job.decode.statistics()["handed_tokens"] - before == 300
    for one, other in zip(handed, job.prefill.routed(prompt, n=4, max_tokens=6, seed=5), strict=True):
        assert_same(one, other)


def test_a_later_turn_reports_the_experts_of_its_own_tokens(job: Job) -> None:
    (prompt,) = job.decode.prompts(200, seed=3)
    first = greedy(job.decode, prompt, length=40)
    longer = [*prompt, *first.tokens.tolist(), *prompt[:50]]
    assert_same(greedy(job.decode, longer, routes_from=239), greedy(job.prefill, longer, routes_from=239))


# --- tiers ------------------------------------------------------------------------------------------------------------
def test_what_comes_back_from_host_memory_and_disk_is_complete(job: Job) -> None:
    """More prompts than cache and host memory hold, asked for a second time."""
    prompts = job.decode.prompts(*[530 + 7 * i for i in range(7)], seed=4)
    expected = [greedy(job.prefill, prompt) for prompt in prompts]
    before = job.prefill.statistics()
    for prompt, completion in zip(prompts, expected, strict=True):
        assert_same(greedy(job.decode, prompt), completion)
    after = job.prefill.statistics()
    hits, asked = after["outside_hit_tokens"] - before["outside_hit_tokens"], sum(map(len, prompts))
    assert hits > 0.3 * asked
    assert after["host_read_bytes"] - before["host_read_bytes"] >= hits / BLOCK * BLOCK_BYTES
    assert after["disk_read_bytes"] > before["disk_read_bytes"]
    assert after["disk_written_bytes"] > 7 * 4 * BLOCK_BYTES


def test_no_hit_mixes_versions(job: Job, version: int) -> None:
    """A prompt that cache, host memory and disk know from the version before."""
    (prompt,) = job.decode.prompts(400, seed=5)
    old = greedy(job.decode, prompt)
    job.publish(version + 1, seed=7)
    before = job.prefill.statistics()
    new = greedy(job.decode, prompt)
    after = job.prefill.statistics()
    assert_same(new, greedy(job.prefill, prompt))
    assert set(new.versions.tolist()) == {version + 1}
    np.testing.assert_allclose(new.logprobs, job.decode.trainer.logprobs(prompt, new), atol=1e-4)
    assert np.abs(new.logprobs - old.logprobs).max() > 1e-3
    assert after["outside_hit_tokens"] == before["outside_hit_tokens"]
    assert after["prefix_hit_tokens"] == before["prefix_hit_tokens"]


def test_after_an_update_running_sequences_add_nothing_to_the_tiers(job: Job, version: int) -> None:
    """Their keys and values are of both versions, and another engine may still serve the first."""
    (prompt,) = job.decode.prompts(130, seed=6)
    before = job.decode.statistics()

    async def test() -> Completion:
        for engine in (job.prefill, job.decode):
            await engine.client.prepare(manifest)
        asked = asyncio.create_task(
            job.decode.client.generate(prompt, Sampling(temperature=0.0, max_tokens=500), stop=[])
        )
        async with asyncio.timeout(60):
            while (await job.decode.client.statistics())["generated_tokens"] - before["generated_tokens"] < BLOCK:
                await asyncio.sleep(0.01)
        for engine in (job.decode, job.prefill):
            await engine.client.commit(manifest.version)
        (completion,) = await asked
        return completion

    manifest = job.changed(version + 1, seed=8)
    completion = job.decode.run(test())
    old = int((completion.versions == version).sum())
    assert set(completion.versions.tolist()) == {version, version + 1}
    written = job.decode.statistics()["host_written_bytes"] - before["host_written_bytes"]
    routes = BLOCK * 2 * 2
    assert 0 < written <= (len(prompt) + old) // BLOCK * (BLOCK_BYTES + routes)


# --- weights change and engines are lost ------------------------------------------------------------------------------
async def until(served: Served, name: str, least: float) -> None:
    """Until a statistic is as large."""
    async with asyncio.timeout(60):
        while (await served.client.statistics())[name] < least:
            await asyncio.sleep(0.01)


async def until_nothing_is_kept(engine: Served) -> None:
    async with asyncio.timeout(60):
        while (await engine.client.statistics())["kv_usage"]:
            await asyncio.sleep(0.01)


def asked(engine: Served, prompt: list[int]) -> asyncio.Task[list[Completion]]:
    sampling = Sampling(temperature=0.0, max_tokens=12)
    return asyncio.create_task(engine.client.generate(prompt, sampling, stop=[], routes_from=0))


def test_an_update_waits_for_no_prompt_that_another_engine_has_to_fetch(job: Job, version: int) -> None:
    """It is fetched afterwards, by an engine that still serves what computed it."""
    (prompt,) = job.decode.prompts(300, seed=20)
    expected = greedy(job.prefill, prompt)
    before = job.decode.statistics()["handed_tokens"]
    manifest = job.changed(version + 1, seed=21)

    async def test() -> list[Completion]:
        await job.decode.post("/pause")
        completions = asked(job.decode, prompt)
        await until(job.prefill, "kv_usage", 0.1)
        await job.prefill.serve(manifest)
        assert (await job.prefill.client.statistics())["kv_usage"] > 0.1
        await job.decode.post("/resume")
        return await completions

    (completion,) = job.decode.run(test())
    assert_same(completion, expected)
    assert job.decode.statistics()["handed_tokens"] - before == 300
    job.decode.run(until_nothing_is_kept(job.prefill))
    job.decode.run(job.decode.serve(manifest))


@pytest.mark.parametrize("updated", ["prefill", "decode"])
def test_a_prompt_of_weights_that_one_engine_serves_no_more_is_let_go(job: Job, version: int, updated: str) -> None:
    (prompt,) = job.decode.prompts(300, seed=22)
    expected = {version: greedy(job.prefill, prompt)}
    old, new = (job.prefill, job.decode) if updated == "decode" else (job.decode, job.prefill)
    before, busy = job.decode.statistics()["handed_tokens"], job.prefill.statistics()["busy_seconds"]
    manifest = job.changed(version + 1, seed=23)

    async def test() -> list[Completion]:
        await job.prefill.post("/pause")
        completions = asked(job.decode, prompt)
        await until(job.prefill, "busy_seconds", busy + 0.001)  # it has let the prompt in
        await new.serve(manifest)
        await job.prefill.post("/resume")
        return await completions

    (completion,) = job.decode.run(test())
    assert job.decode.statistics()["handed_tokens"] == before
    job.decode.run(until_nothing_is_kept(job.prefill))
    job.decode.run(old.serve(manifest))
    expected[version + 1] = greedy(job.prefill, prompt)
    assert_same(completion, expected[version + (updated == "decode")])


def test_no_hand_over_mixes_versions_and_no_request_is_lost(job: Job, version: int) -> None:
    async def test() -> list[Completion]:
        prompts = job.decode.prompts(*[60 + 9 * i for i in range(10)], seed=9)
        async with asyncio.TaskGroup() as tasks:
            asked = [
                tasks.create_task(
                    job.decode.client.generate(p, Sampling(max_tokens=60, seed=i), stop=[], routes_from=0)
                )
                for i, p in enumerate(prompts)
            ]
            for step in (1, 2):
                manifest = job.decode.trainer.send(version + step)
                async with asyncio.TaskGroup() as updates:
                    for engine in (job.prefill, job.decode):
                        updates.create_task(engine.serve(manifest))
        return [completion for task in asked for completion in task.result()]

    for completion in job.decode.run(test()):
        assert len(completion.tokens) == 60
        spans = completion.versions.tolist()
        assert spans == sorted(spans)
        assert set(spans) <= {version, version + 1, version + 2}
        assert completion.routes is not None
        rows = completion.routes.versions[: -len(completion.tokens) + 1]
        assert set(rows.tolist()) <= {spans[0], -1}  # the prompt was computed under one version, or it is not known


def test_engines_of_different_versions_hand_nothing_over(job: Job, version: int) -> None:
    before = job.decode.statistics()["handed_tokens"]
    manifest = job.decode.publish(version + 1, seed=11)
    (prompt,) = job.decode.prompts(300, seed=10)
    computed = greedy(job.decode, prompt)
    assert job.decode.statistics()["handed_tokens"] == before
    job.prefill.run(job.prefill.serve(manifest))
    assert_same(computed, greedy(job.prefill, prompt))


def test_without_the_other_engine_the_one_that_decodes_computes_prompts(job: Job, version: int) -> None:
    """The last test of the module: the engine for prompts is gone afterwards."""
    job.publish(version + 1, seed=12)
    prompts = known, fresh, late = job.decode.prompts(300, 310, 320, seed=11)
    expected = [greedy(job.prefill, prompt) for prompt in prompts]
    assert_same(greedy(job.decode, known), expected[0])
    before = job.decode.statistics()["handed_tokens"]

    async def lost() -> list[Completion]:
        asked = asyncio.create_task(
            job.decode.client.generate(late, Sampling(temperature=0.0, max_tokens=12), stop=[], routes_from=0)
        )
        stopping = asyncio.get_running_loop().run_in_executor(None, job.prefill.stopped)
        completions = await asked
        assert await stopping == 0
        return completions

    (completion,) = job.decode.background.run(lost())
    assert_same(completion, expected[2])
    assert_same(greedy(job.decode, fresh), expected[1])
    assert_same(greedy(job.decode, known), expected[0])
    assert job.decode.statistics()["handed_tokens"] - before in (0, len(late))
