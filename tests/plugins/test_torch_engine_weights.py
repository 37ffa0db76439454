"""Weight updates while requests run: versions change inside a completion, and a bad version changes nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import attrs
import numpy as np
import pytest
from prl.errors import InfrastructureError
from prl.types import Completion, Manifest, Sampling

from tests.plugins.served_engine import Served
from tests.plugins.test_torch_engine_server import served
from tests.plugins.tiny_engine import chosen, reference_logprobs, tiny_model

PROMPT = [2, 3, 4]
GREEDY = Sampling(temperature=0.0, max_tokens=8)


async def greedy(engine: Served) -> Completion:
    (completion,) = await engine.client.generate(PROMPT, GREEDY, stop=[])
    return completion


def follows(completion: Completion, seed: int) -> bool:
    """Whether the log-probabilities are those of `tiny_model(seed)`."""
    return np.allclose(
        completion.logprobs, chosen(reference_logprobs(tiny_model(seed), PROMPT, completion), completion)
    )


def test_a_committed_version_is_what_is_served(tmp_path: Path) -> None:
    async def test(engine: Served) -> None:
        assert follows(await greedy(engine), 0)
        await engine.client.prepare(engine.write(1, tiny_model(1)))
        assert follows(await greedy(engine), 0)
        await engine.client.commit(1)
        completion = await greedy(engine)
        assert follows(completion, 1)
        assert completion.versions.tolist() == [1] * 8
        await engine.update(2, tiny_model(2))
        assert follows(await greedy(engine), 2)
        assert (await engine.client.statistics())["updates"] == 3

    served(tmp_path, test)


def test_committing_twice_is_fine_and_committing_the_unknown_is_not(tmp_path: Path) -> None:
    async def test(engine: Served) -> None:
        await engine.update(1, tiny_model(1))
        await engine.client.commit(1)
        assert (await engine.client.statistics())["updates"] == 2
        with pytest.raises(InfrastructureError, match=r"409: version 2 was not prepared \(no version is prepared, ver"):
            await engine.client.commit(2)
        await engine.client.prepare(engine.write(3, tiny_model(3)))
        with pytest.raises(InfrastructureError, match="version 3 is prepared, version 1 is served"):
            await engine.client.commit(2)
        await engine.client.commit(1)
        await engine.client.commit(3)
        assert follows(await greedy(engine), 3)
        with pytest.raises(InfrastructureError, match="409: version 2 is older than version 3, which is served"):
            await engine.client.prepare(engine.write(2, tiny_model(2)))

    served(tmp_path, test)


def damaged(engine: Served) -> Manifest:
    manifest = engine.write(1, tiny_model(1))
    path = Path(manifest.parts[0].location)
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40
    path.write_bytes(content)
    return manifest


def incomplete(engine: Served) -> Manifest:
    manifest = engine.write(1, tiny_model(1))
    (part,) = manifest.parts
    kept = tuple(tensor for tensor in part.tensors if tensor.name != "norm.weight")
    return attrs.evolve(manifest, parts=(attrs.evolve(part, tensors=kept),))


def misshapen(engine: Served) -> Manifest:
    model = tiny_model(1)
    model.norm.weight.data = model.norm.weight.data[:16].clone()
    return engine.write(1, model)


def absent(engine: Served) -> Manifest:
    manifest = engine.write(1, tiny_model(1))
    Path(manifest.parts[0].location).unlink()
    return manifest


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (damaged, "has checksum"),
        (incomplete, "lacks 'norm.weight', which the model's norm.weight needs"),
        (misshapen, r"has norm.weight of shape \(16,\), the model needs \(32,\)"),
        (absent, "is gone"),
    ],
)
def test_a_version_that_cannot_be_prepared_leaves_the_old_one_serving(tmp_path: Path, spoil, reason: str) -> None:  # type: ignore[no-untyped-def]
    async def test(engine: Served) -> None:
        with pytest.raises(InfrastructureError, match=f"answered 422: version 1 cannot be prepared: .*{reason}"):
            await engine.client.prepare(spoil(engine))
        with pytest.raises(InfrastructureError, match="version 1 was not prepared"):
            await engine.client.commit(1)
        completion = await greedy(engine)
        assert follows(completion, 0)
        assert completion.versions.tolist() == [0] * 8
        await engine.update(1, tiny_model(1))
        assert follows(await greedy(engine), 1)

    served(tmp_path, test)


def test_a_manifest_of_the_wrong_shape_is_refused(tmp_path: Path) -> None:
    async def test(engine: Served) -> None:
        broken = attrs.evolve(engine.write(1, tiny_model(1)), version="1")  # type: ignore[arg-type]
        with pytest.raises(InfrastructureError, match=r"answered 400: .*expected int.* @ \$.version"):
            await engine.client.prepare(broken)

    served(tmp_path, test)


def test_versions_change_inside_a_completion_and_no_request_is_lost(tmp_path: Path) -> None:
    async def test(engine: Served) -> None:
        async with asyncio.TaskGroup() as tasks:
            first = [
                tasks.create_task(engine.client.generate(PROMPT, Sampling(max_tokens=500, seed=s), stop=[], n=2))
                for s in range(6)
            ]
            await engine.until("generated_tokens", 40)
            await engine.client.pause()
            before = await engine.client.statistics()
            await engine.update(1, tiny_model(1))
            assert (await engine.client.statistics())["generated_tokens"] == before["generated_tokens"]
            await engine.client.resume()
            await engine.until("generated_tokens", before["generated_tokens"] + 40)
            await engine.update(2, tiny_model(2))  # without a pause: between two steps
        completions = [completion for task in first for completion in task.result()]
        assert [len(c.tokens) for c in completions] == [500] * 12
        assert all((np.diff(c.versions) >= 0).all() for c in completions)
        assert {v for c in completions for v in c.versions.tolist()} == {0, 1, 2}
        assert any(set(c.versions.tolist()) >= {0, 1} for c in completions)

    served(tmp_path, test, length=1024)
