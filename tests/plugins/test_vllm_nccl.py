"""vLLM in two workers that fetch from the trainer over process groups, and keys and values computed anew by updates."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
from prl.errors import InfrastructureError
from prl.types import Completion, Sampling

from tests.plugins.served_vllm import Served, k3, needs_vllm, serving

pytestmark = needs_vllm
LENGTH = 512


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("nccl") / "run"
    edits = (
        'weights.type="nccl"',
        "model.layers=2",
        f"engine.length={LENGTH}",
        "engine.parallel.tensor=2",
        'engine.on_update="recompute"',
    )
    with serving(folder, *edits, plugins="vllm,nccl") as served:
        served.publish(0, seed=1)
        yield served


@pytest.fixture
def version(engine: Served) -> int:
    """The version being served."""
    return int(engine.statistics()["version"])


def test_both_workers_serve_what_the_trainer_sent(engine: Served, version: int) -> None:
    for seed in (2, 3):
        engine.publish(version + seed, seed=seed)
        gaps = engine.gaps(engine.prompts(3, 40, 17))
        assert len(gaps) >= 100
        assert k3(gaps) < 1e-10


def test_a_damaged_version_is_refused_and_the_next_one_served(engine: Served, version: int) -> None:
    (prompt,) = engine.prompts(7)
    before = engine.generate(prompt, temperature=0.0, max_tokens=8)[0]
    engine.trainer.change(seed=4)
    manifest = engine.trainer.send(version + 1)
    engine.trainer.sender._held[version + 1][-3] ^= 0x40
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
