"""vLLM in two workers with half of the experts each, which fetch from the trainer over process groups what they need.

Keys and values are computed anew by updates.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prl.errors import InfrastructureError
from prl.types import Completion, Sampling
from prl_vllm.api import VllmApi

from tests.plugins.served_vllm import Served, k3, needs_vllm, serving

pytestmark = needs_vllm
LENGTH = 768
EXPERTS = 8
MODEL = ("model.layers=2", f"model.experts={EXPERTS}", "model.experts_per_token=2", "model.expert_intermediate_size=64")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("nccl") / "run"
    edits = (
        'weights.type="nccl"',
        *MODEL,
        f"engine.length={LENGTH}",
        "engine.parallel.tensor=2",
        "engine.parallel.experts=true",
        'engine.on_update="recompute"',
    )
    with serving(folder, *edits, plugins="vllm,qwen3,nccl") as served:
        served.publish(0, seed=1)
        yield served


@pytest.fixture
def version(engine: Served) -> int:
    """The version being served."""
    return int(engine.statistics()["version"])


def asked_of_workers(engine: Served, method: str, **arguments: Any) -> list[Any]:
    """What each of vLLM's workers answers, over the socket of its server."""
    import psutil  # comes with vLLM

    (words,) = [child.cmdline() for child in psutil.Process().children() if "--uds" in child.cmdline()]

    async def ask() -> list[Any]:
        api = VllmApi("http://vllm", socket=Path(words[words.index("--uds") + 1]))
        try:
            return await api.call(method, **arguments)
        finally:
            await api.aclose()

    return engine.run(ask())


def test_both_workers_serve_what_the_trainer_sent(engine: Served, version: int) -> None:
    for seed in (2, 3):
        engine.publish(version + seed, seed=seed)
        gaps = engine.gaps(engine.prompts(3, 40, 17))
        assert len(gaps) >= 100
        assert k3(gaps) < 1e-10


def test_a_worker_is_sent_its_own_experts_alone(engine: Served, version: int) -> None:
    manifest = engine.publish(version + 1, seed=7)
    experts = [record for record in manifest.tensors if ".experts." in record.name]
    assert {int(record.name.split(".experts.")[1].split(".")[0]) for record in experts} == set(range(EXPERTS))
    shared, own = manifest.nbytes - sum(record.nbytes for record in experts), sum(record.nbytes for record in experts)
    assert own > shared
    assert engine.trainer.sender.sent_bytes[version + 1] == 2 * shared + own
    assert engine.get("/weights/checksums") == {record.name: record.checksum for record in manifest.tensors}
    numbers = []
    for served in asked_of_workers(engine, "prl_read_back", names=[]):
        assert served.keys() - {record.name for record in experts} == {
            record.name for record in manifest.tensors if record not in experts
        }
        numbers.append({int(name.split(".experts.")[1].split(".")[0]) for name in served if ".experts." in name})
    assert numbers == [set(range(EXPERTS // 2)), set(range(EXPERTS // 2, EXPERTS))]


def test_a_worker_can_load_again_what_it_served(engine: Served, version: int) -> None:
    """As after a commit that failed: from what it kept, while the version after it is prepared."""
    (prompt,) = engine.prompts(7)
    before, served = engine.generate(prompt, temperature=0.0, max_tokens=8)[0], engine.get("/weights/checksums")
    engine.trainer.change(seed=8)
    engine.run(engine.client.prepare(engine.trainer.send(version + 1)))
    assert asked_of_workers(engine, "prl_restore") == [{"version": version}] * 2
    after = engine.generate(prompt, temperature=0.0, max_tokens=8)[0]
    assert (after.tokens.tolist(), after.logprobs.tolist()) == (before.tokens.tolist(), before.logprobs.tolist())
    assert engine.get("/weights/checksums") == served
    engine.run(engine.client.commit(version + 1))
    assert k3(engine.gaps([prompt])) < 1e-10


def test_a_damaged_version_is_refused_and_the_next_one_served(engine: Served, version: int) -> None:
    (prompt,) = engine.prompts(7)
    before = engine.generate(prompt, temperature=0.0, max_tokens=8)[0]
    engine.trainer.change(seed=4)
    manifest = engine.trainer.send(version + 1)
    memory = engine.trainer.sender._held[version + 1]
    memory.span(memory.end - 3, memory.end)[0] ^= 0x40
    with pytest.raises(InfrastructureError, match=f"422: version {version + 1} cannot be prepared: .*has checksum"):
        engine.run(engine.client.prepare(manifest))
    after = engine.generate(prompt, temperature=0.0, max_tokens=8)[0]
    assert (after.tokens.tolist(), after.logprobs.tolist()) == (before.tokens.tolist(), before.logprobs.tolist())
    engine.run(engine.serve(engine.trainer.send(version + 1)))
    assert k3(engine.gaps([prompt])) < 1e-10


def test_keys_and_values_are_computed_anew_in_the_middle_of_a_completion(engine: Served, version: int) -> None:
    """Tokens after the update are those of a model that never had other weights; keeping would be far from it."""
    (prompt,) = engine.prompts(20)
    engine.publish(version + 1, seed=5)
    engine.trainer.change(seed=6)
    manifest = engine.trainer.send(version + 2)

    async def updated() -> list[Completion]:
        await engine.client.prepare(manifest)
        start = (await engine.client.statistics())["generated_tokens"]
        sampling = Sampling(max_tokens=LENGTH - 20, seed=3)
        async with asyncio.timeout(300), asyncio.TaskGroup() as tasks:
            asked = tasks.create_task(engine.client.generate(prompt, sampling, stop=(), n=2))
            while (await engine.client.statistics())["generated_tokens"] < start + 10:
                pass
            await engine.client.commit(version + 2)
        return asked.result()

    completions = engine.run(updated())
    assert [sorted(set(c.versions.tolist())) for c in completions] == [[version + 1, version + 2]] * 2
    gaps = []
    for seed, newest in ((5, version + 1), (6, version + 2)):
        engine.trainer.change(seed)
        for completion in completions:
            under = completion.versions == newest
            gaps.append((engine.trainer.logprobs(prompt, completion) - completion.logprobs)[under])
            assert len(gaps[-1]) > 0
    assert np.abs(np.concatenate(gaps)).max() < 1e-4
