"""vLLM behind the engine process: what it samples, under which version, and how new versions come in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import attrs
import numpy as np
import openai
import pytest
from prl.errors import InfrastructureError
from prl.serve.metrics import STATISTICS
from prl.types import Completion, Manifest, Sampling, StopReason, TensorRecord

from tests.plugins.served_vllm import Served, k3, needs_vllm, serving

pytestmark = needs_vllm
LENGTH = 512
CHUNK = 64
"""Tokens of a step: long prompts are computed in several."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A dense model through files, keeping keys and values across updates."""
    folder = tmp_path_factory.mktemp("vllm") / "run"
    chunks = f"engine.options={{max_num_batched_tokens={CHUNK}}}"
    edits = ('weights.type="disk"', "model.layers=2", f"engine.length={LENGTH}", chunks)
    with serving(folder, *edits, plugins="vllm,disk") as served:
        served.publish(0, seed=1)
        yield served


@pytest.fixture
def version(engine: Served) -> int:
    """The version being served."""
    return int(engine.statistics()["version"])


def test_statistics_are_those_of_every_engine(engine: Served) -> None:
    said = engine.statistics()
    assert said.keys() == STATISTICS.keys()
    assert (said["sequences"], said["length"]) == (16, LENGTH)
    assert said["kv_tokens"] >= 16 * LENGTH
    assert 0 <= said["kv_usage"] < 1


# --- what it samples --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_the_trainers_under_the_sampling_temperature(engine: Served, temperature: float) -> None:
    gaps = engine.gaps(engine.prompts(3, 40, 17), temperature=temperature)
    assert len(gaps) >= 100
    assert k3(gaps) < 1e-10
    assert np.abs(gaps).max() < 1e-4


def test_greedy_logprobs_are_those_of_temperature_one(engine: Served) -> None:
    (prompt,) = engine.prompts(9)
    (completion,) = engine.generate(prompt, temperature=0.0, max_tokens=12)
    np.testing.assert_allclose(completion.logprobs, engine.trainer.logprobs(prompt, completion), atol=1e-4)


def test_seeds_decide_what_is_sampled_alone_and_among_siblings(engine: Served) -> None:
    (prompt,) = engine.prompts(5)
    together = engine.generate(prompt, n=20, seed=7, max_tokens=8)  # more than the engine's sequences
    alone = [engine.generate(prompt, seed=7 + member, max_tokens=8)[0] for member in (0, 3, 18)]
    assert len(together) == 20
    assert [c.tokens.tolist() for c in alone] == [together[member].tokens.tolist() for member in (0, 3, 18)]
    assert len({tuple(c.tokens.tolist()) for c in together}) > 10


def test_stop_tokens_wait_for_the_fewest_tokens(engine: Served) -> None:
    (prompt,) = engine.prompts(6)
    stops = tuple(range(3, 19))
    (short,) = engine.generate(prompt, stop=stops, max_tokens=40, seed=1)
    assert (short.stop, short.tokens[-1] in stops) == (StopReason.STOP, True)
    (long,) = engine.generate(prompt, stop=stops, min_tokens=5, max_tokens=40, seed=1)
    assert len(long.tokens) > 5
    assert not set(long.tokens[:5].tolist()) & set(stops)
    renormalised = engine.trainer.logprobs(prompt, long, without=stops)
    np.testing.assert_allclose(long.logprobs[:5], renormalised[:5], atol=1e-4)


def test_a_sequence_ends_at_the_longest_length(engine: Served) -> None:
    (prompt,) = engine.prompts(LENGTH - 4)
    (completion,) = engine.generate(prompt, max_tokens=40)
    assert (len(completion.tokens), completion.stop) == (4, StopReason.LENGTH)
    with pytest.raises(InfrastructureError, match=rf"400: the prompt has {LENGTH} tokens; a sequence has room"):
        engine.generate([*prompt, 3, 3, 3, 3])


def test_openais_client_talks_to_the_policy(engine: Served) -> None:
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key=engine.token, max_retries=0) as client:
        (model,) = client.models.list()
        question = [{"role": "user", "content": "sun"}]
        answer = client.chat.completions.create(model=model.id, messages=question, max_tokens=5, temperature=0)  # type: ignore[arg-type]
        stream = client.chat.completions.create(  # type: ignore[call-overload]
            model=model.id, messages=question, max_tokens=5, temperature=0, stream=True
        )
        streamed = "".join(event.choices[0].delta.content or "" for event in stream)
    assert model.id == "qwen3"
    assert answer.usage is not None
    assert 1 <= answer.usage.completion_tokens <= 5
    assert streamed == answer.choices[0].message.content


# --- requests that end early ------------------------------------------------------------------------------------------
async def until_running(engine: Served, least: int) -> None:
    async with asyncio.timeout(60):
        while (await engine.client.statistics())["running"] < least:
            pass


def test_a_cancelled_request_is_aborted(engine: Served) -> None:
    async def test() -> None:
        (prompt,) = engine.prompts(4)
        asked = asyncio.create_task(engine.client.generate(prompt, Sampling(max_tokens=500), stop=[], n=4))
        await until_running(engine, 4)
        asked.cancel()
        async with asyncio.timeout(60):
            while (await engine.client.statistics())["running"]:
                # Older releases count only as they compute: what is aborted last is counted on until then.
                await engine.client.generate(prompt, Sampling(max_tokens=1), stop=[])

    engine.run(test())


# --- weights ----------------------------------------------------------------------------------------------------------
def test_what_is_served_is_what_was_sent_bit_for_bit(engine: Served, version: int) -> None:
    manifest = engine.publish(version + 1, seed=5)
    assert engine.get("/weights/checksums") == {record.name: record.checksum for record in manifest.tensors}
    gaps = engine.gaps(engine.prompts(30))
    assert k3(gaps) < 1e-10


def test_a_version_is_prepared_beside_the_one_being_served(engine: Served, version: int) -> None:
    (prompt,) = engine.prompts(8)
    before = engine.generate(prompt, temperature=0.0, max_tokens=8)[0]
    engine.trainer.change(seed=6)
    manifest = engine.trainer.send(version + 1)
    engine.run(engine.client.prepare(manifest))
    beside = engine.generate(prompt, temperature=0.0, max_tokens=8)[0]
    assert beside.tokens.tolist() == before.tokens.tolist()
    assert set(beside.versions.tolist()) == {version}
    engine.run(engine.client.commit(version + 1))
    engine.run(engine.client.commit(version + 1))
    after = engine.generate(prompt, temperature=0.0, max_tokens=8)[0]
    assert set(after.versions.tolist()) == {version + 1}
    np.testing.assert_allclose(after.logprobs, engine.trainer.logprobs(prompt, after), atol=1e-4)


def test_versions_that_were_not_prepared_or_are_older_are_refused(engine: Served, version: int) -> None:
    with pytest.raises(InfrastructureError, match=r"409: version 99 was not prepared \(no version is prepared, ver"):
        engine.run(engine.client.commit(99))
    old = engine.trainer.send(version - 1)
    with pytest.raises(InfrastructureError, match=f"409: version {version - 1} is older than version {version}, whic"):
        engine.run(engine.client.prepare(old))


def damaged(manifest: Manifest) -> Manifest:
    path = Path(manifest.parts[0].location)
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40
    path.write_bytes(content)
    return manifest


def truncated(manifest: Manifest) -> Manifest:
    path = Path(manifest.parts[0].location)
    path.write_bytes(path.read_bytes()[:-64])
    return manifest


def with_tensors(manifest: Manifest, tensors: Iterable[TensorRecord]) -> Manifest:
    (part,) = manifest.parts
    return attrs.evolve(manifest, parts=(attrs.evolve(part, tensors=tuple(tensors)),))


def incomplete(manifest: Manifest) -> Manifest:
    return with_tensors(manifest, (t for t in manifest.tensors if t.name != "model.norm.weight"))


def misshapen(manifest: Manifest) -> Manifest:
    records = (attrs.evolve(t, shape=(2, 64)) if t.name == "model.norm.weight" else t for t in manifest.tensors)
    return with_tensors(manifest, records)


def swollen(manifest: Manifest) -> Manifest:
    extra = attrs.evolve(manifest.tensors[0], name="model.other.weight")
    return with_tensors(manifest, (*manifest.tensors, extra))


def absent(manifest: Manifest) -> Manifest:
    Path(manifest.parts[0].location).unlink()
    return manifest


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (damaged, "has checksum"),
        (truncated, "ends at byte"),
        (incomplete, "lacks model.norm.weight, which the model needs"),
        (misshapen, r"has model.norm.weight of shape \(2, 64\), the model needs \(128,\)"),
        (swollen, "has model.other.weight, which is no part of the model"),
        (absent, "is gone"),
    ],
)
def test_a_version_that_cannot_be_prepared_leaves_the_old_one_serving(
    engine: Served, version: int, spoil: Callable[[Manifest], Manifest], reason: str
) -> None:
    (prompt,) = engine.prompts(7)
    before = engine.generate(prompt, temperature=0.0, max_tokens=8)[0]
    manifest = spoil(engine.trainer.send(version + 1))
    with pytest.raises(InfrastructureError, match=f"422: version {version + 1} cannot be prepared: .*{reason}"):
        engine.run(engine.client.prepare(manifest))
    with pytest.raises(InfrastructureError, match=f"version {version + 1} was not prepared"):
        engine.run(engine.client.commit(version + 1))
    after = engine.generate(prompt, temperature=0.0, max_tokens=8)[0]
    assert after.tokens.tolist() == before.tokens.tolist()
    assert after.logprobs.tolist() == before.logprobs.tolist()
    assert set(after.versions.tolist()) == {version}


def test_versions_change_inside_a_completion_and_no_request_is_lost(engine: Served, version: int) -> None:
    async def test() -> list[list[int]]:
        prompts = engine.prompts(3, 5, 4, 6, 8, 9, 3, 4, 5, 7, seed=3)
        async with asyncio.TaskGroup() as tasks:
            asked = [
                tasks.create_task(engine.client.generate(prompt, Sampling(max_tokens=300, seed=s), stop=[], n=2))
                for s, prompt in enumerate(prompts)  # 20 sequences for 16 places
            ]
            await until_running(engine, 8)
            await engine.serve(engine.trainer.send(version + 1))
            await until_running(engine, 4)
            await engine.serve(engine.trainer.send(version + 2))
        return [completion.versions.tolist() for task in asked for completion in task.result()]

    spans = engine.run(test())
    assert [len(span) for span in spans] == [300] * 20
    assert all(span == sorted(span) for span in spans)
    assert {v for span in spans for v in span} == {version, version + 1, version + 2}
    assert any(len(set(span)) > 1 for span in spans)


def test_a_prompt_in_the_middle_of_an_update_is_computed_by_the_new_weights_alone(engine: Served, version: int) -> None:
    """And one that waits behind it, whose beginning was computed before."""
    beginning, *rest = engine.prompts(256, *[240] * 8, seed=4)
    prompts = [[*beginning, *end] for end in rest]

    async def test() -> list[Completion]:
        await engine.client.prepare(manifest)
        async with asyncio.TaskGroup() as tasks:
            asked = [
                tasks.create_task(engine.client.generate(p, Sampling(max_tokens=4, seed=i), stop=[]))
                for i, p in enumerate(prompts)
            ]
            async with asyncio.timeout(60):
                while (await engine.client.statistics())["generated_tokens"] == before:
                    pass
            await engine.client.commit(version + 1)
        return [completion for task in asked for completion in task.result()]

    before = engine.statistics()["generated_tokens"]
    engine.trainer.change(seed=10)
    manifest = engine.trainer.send(version + 1)
    completions = engine.run(test())
    fresh = [(p, c) for p, c in zip(prompts, completions, strict=True) if set(c.versions.tolist()) == {version + 1}]
    assert fresh
    for prompt, completion in fresh:
        np.testing.assert_allclose(completion.logprobs, engine.trainer.logprobs(prompt, completion), atol=1e-4)


def test_prompts_reuse_what_was_computed_under_the_same_version_alone(engine: Served, version: int) -> None:
    (prompt,) = engine.prompts(300, seed=9)

    def hits() -> float:
        return engine.statistics()["prefix_hit_tokens"]

    engine.generate(prompt, max_tokens=1)
    before = hits()
    engine.generate(prompt, max_tokens=1)
    assert hits() - before >= 128  # blocks of 128 tokens
    engine.publish(version + 1, seed=8)
    before = hits()
    gaps = engine.gaps([prompt], n=1)
    assert hits() == before
    assert k3(gaps) < 1e-10


# --- the end ----------------------------------------------------------------------------------------------------------
def test_a_server_that_is_killed_ends_the_engine_and_everything_it_started(engine: Served) -> None:
    """The last test of the module: the engine is gone afterwards."""
    import psutil  # comes with vLLM

    api_server, *others = [
        process
        for process in psutil.Process().children(recursive=True)
        if "vllm" in " ".join(process.cmdline()).lower()
    ]
    assert len(others) >= 2  # engine core and worker
    api_server.kill()
    with pytest.raises(InfrastructureError, match=f"vLLM's server .process {api_server.pid}. ended by itself"):
        engine.ended()
    gone, alive = psutil.wait_procs(others, timeout=60)
    assert (len(gone), alive) == (len(others), [])
