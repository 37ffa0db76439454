"""A trainer rank as the controller sees it: a real hub on one side, a real rank on the other, a tiny model between."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from prl import checkpoint_dir
from prl.compose.compose import Composition, compose, create_run
from prl.dispatch.hub import Hub
from prl.dispatch.trainer import Trainer, manifest_of
from prl.errors import RunError
from prl.messages import Publish, Retire, Save, StepDone, Stop, TrainStep
from prl.run_dir import RunDir
from prl.train import worker
from prl_disk import DiskConfig
from prl_disk.files import receive
from safetensors.torch import load_file

from tests.train.tiny import SameNames, TinyModel, commit_checkpoint, pack_batch, random_samples

TINY_PLUGIN = """
    import attrs
    from prl import hookimpl
    from prl.compose.config import ModelConfig
    from prl.providers import Model

    @attrs.frozen(kw_only=True)
    class TinyConfig(ModelConfig):
        pass

    @hookimpl
    def prl_models():
        here = "tests.train.test_worker"
        yield Model(name="tiny", config=TinyConfig, summary="", build=f"{here}:build_tiny", weights=f"{here}:weights",
                    render=f"{here}:weights", special_tokens=("<|end|>",))
"""
SETTINGS = (
    'model.type="tiny"',
    'tokenizer.characters="abcdefghijklmnopqrstuvw"',
    'losses.rl={type="dppo"}',
    'losses.ce={type="cross_entropy"}',
    'losses.ref_kl={type="ref_kl"}',
    'optimizer={type="adamw", learning_rate=0.01}',
    'quantization.type="bf16"',
    'weights.type="disk"',
    'trainer.device="cpu"',
)

WORD_LEVEL = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {f"{i}": i for i in range(23)} | {"<|end|>": 23}, "unk_token": "0"},
    }
)
"""A tokenizer.json of 24 tokens."""


def build_tiny(config, vocab_size: int) -> TinyModel:
    return TinyModel(vocab_size)


def weights(config, vocab_size: int) -> SameNames:
    return SameNames()


@pytest.fixture
def launched(toy_config, throwaway_plugin, tmp_path):
    """`launched(*settings)`: a composition and its run directory."""
    throwaway_plugin("tiny", TINY_PLUGIN)
    runs = iter(range(100))

    def launch(*settings: str) -> tuple[Composition, RunDir]:
        overrides = (*SETTINGS, f'run.dir="{tmp_path}/run-{next(runs)}"', *settings)
        plugins = "tiny,qwen3,policy_gradient,adamw,native,disk"
        composition = compose(toy_config, plugins=plugins, overrides=overrides)
        return composition, create_run(composition, toy_config)

    return launch


def converse(composition: Composition, run_dir: RunDir, orders) -> list[object]:
    """Run a rank, give it `orders` one by one, then Stop; its replies, Hello first."""

    async def controller() -> list[object]:
        async with Hub(run_dir) as hub, asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(hub.serve())
            rank = tasks.create_task(run_rank(composition, run_dir, serving))
            peer, hello = await hub.hello("trainer", 0)
            replies: list[object] = [hello]
            try:
                for order in orders:
                    await hub.send(peer, order)
                    if isinstance(order, Save):
                        replies.append(await hub.saved(0))
                    elif not isinstance(order, Retire):
                        replies.append(await hub.reply(peer))
            finally:
                await hub.send(peer, Stop())
            assert await rank == 0
            serving.cancel()
        return replies

    return asyncio.run(controller())


async def run_rank(composition: Composition, run_dir: RunDir, serving: asyncio.Task[None]) -> int:
    """The rank, in a thread; if it fails, what it told the controller about that arrives first."""
    try:
        return await asyncio.to_thread(worker.main, composition, run_dir)
    except Exception:
        await asyncio.wait([serving], timeout=60)
        raise


def train_step(version: int, *, publish: bool = False) -> TrainStep:
    batch = pack_batch(random_samples(6, seed=version, version=version), step=version + 1, version=version)
    return TrainStep(batch=batch, learning_rate=0.01, publish=publish)


def fetched(manifest) -> dict[str, torch.Tensor]:
    return dict(receive(DiskConfig(), Path(manifest.parts[0].location).parents[2]).fetch(manifest))


def test_hello_publish_train_and_retire(launched):
    composition, run_dir = launched()
    orders = [Publish(), train_step(0), train_step(1, publish=True), Retire(version=0)]
    hello, published, first, second = converse(composition, run_dir, orders)
    assert (hello.role, hello.index, hello.world_size, hello.version) == ("trainer", 0, 1, 0)
    assert (published.version, dict(published.sums), published.manifest.version) == (0, {}, 0)
    assert (first.step, first.version, first.manifest) == (1, 1, None)
    assert {"loss/rl", "loss/ce", "loss/ref_kl", "loss/rl/masked", "mismatch/k3", "entropy"} <= first.sums.keys()
    assert first.values["learning_rate"] == 0.01
    assert first.values["grad_norm"] > 0
    assert first.seconds.keys() == {"wait", "forward_backward", "optimizer", "publish"}
    assert (second.version, second.manifest.version) == (2, 2)
    newest = fetched(second.manifest)
    assert newest.keys() == TinyModel(24).state_dict().keys()
    assert newest["output.weight"].dtype == torch.bfloat16
    assert not Path(published.manifest.parts[0].location).exists()


def test_the_seed_makes_the_first_weights(launched):
    def published(seed: int) -> dict[str, torch.Tensor]:
        _, done = converse(*launched(f"run.seed={seed}", 'quantization.type="fp32"'), [Publish()])
        return fetched(done.manifest)

    torch.manual_seed(3)
    expected = TinyModel(24).state_dict()
    one, again, other = published(3), published(3), published(4)
    assert all(torch.equal(one[name], expected[name]) and torch.equal(again[name], one[name]) for name in expected)
    assert not torch.equal(other["output.weight"], one["output.weight"])


def test_a_resumed_rank_continues_where_the_checkpoint_was(launched, tmp_path):
    checkpoint = tmp_path / "step-1"
    orders = [train_step(0), Save(step=1, path=str(checkpoint_dir.partial(checkpoint))), train_step(1, publish=True)]
    _, _, saved, uninterrupted = converse(*launched(), orders)
    assert (saved.step, saved.rank) == (1, 0)
    assert saved.files.keys() == {"trainer/rank-0.safetensors", "trainer/rank-0.json"}
    commit_checkpoint(checkpoint, step=1)
    hello, resumed = converse(*launched(f'checkpoints.resume="{checkpoint}"'), [train_step(1, publish=True)])
    assert hello.version == 1
    assert [t.checksum for t in resumed.manifest.tensors] == [t.checksum for t in uninterrupted.manifest.tensors]
    assert dict(resumed.sums) == dict(uninterrupted.sums)


def test_two_ranks_under_the_agent(launched, toy_plugin, monkeypatch):
    """The whole trainer: the agent, two `prl worker` processes below it, one manifest."""
    sizes = "hidden_size=16, intermediate_size=24, layers=1, heads=2, kv_heads=1, head_dim=8"
    _, run_dir = launched(f'model={{type="qwen3", {sizes}}}', "trainer.ranks=2")
    batch = pack_batch(random_samples(6, version=0), ranks=2, step=1, version=0)
    program = [sys.executable, "-m", "prl", "worker", "--run", str(run_dir.path), "--role", "trainer", "--index", "0"]
    sites = [str(toy_plugin), str(toy_plugin.parent / "site-prl_tiny"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sites))

    async def controller() -> list[StepDone]:
        async with asyncio.timeout(120), Hub(run_dir) as hub, asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(hub.serve())
            ranks = [await hub.hello("trainer", rank) for rank in range(2)]
            assert [hello.world_size for _, hello in ranks] == [2, 2]
            trainer = Trainer(hub, [peer for peer, _ in ranks])
            reports = await trainer.step(batch, learning_rate=0.01, publish=True)
            for peer, _ in ranks:
                await hub.send(peer, Stop())
            assert await asyncio.to_thread(agent.wait, 60) == 0
            serving.cancel()
        return reports

    with subprocess.Popen(program) as agent:
        try:
            first, second = asyncio.run(controller())
        finally:
            agent.kill()
    assert (first.version, second.version) == (1, 1)
    assert first.values["grad_norm"] == second.values["grad_norm"] > 0
    shares = [fetched(report.manifest) for report in (first, second)]
    assert not shares[0].keys() & shares[1].keys()
    assert all(shares), "both ranks send"
    assert fetched(manifest_of([first, second])).keys() == shares[0].keys() | shares[1].keys()
    assert (shares[0] | shares[1])["model.layers.0.self_attn.q_proj.weight"].shape == (16, 16)


def test_the_policy_of_a_checkpoint_is_what_another_run_starts_from(launched, tmp_path):
    """In the trainer's precision, whatever engines serve in."""
    vocabulary = tmp_path / "vocabulary.json"
    vocabulary.write_text(WORD_LEVEL)
    wordlist = (f'tokenizer={{file="{vocabulary}"}}',)
    _, _, _, trained = converse(
        *launched(*wordlist), [train_step(0), Save(step=1, path=str(tmp_path / "saved")), Publish()]
    )
    policy = tmp_path / "saved" / "huggingface"
    stored = load_file(policy / "model.safetensors")
    assert stored["output.weight"].dtype == torch.float32
    assert (policy / "tokenizer.json").read_bytes() == vocabulary.read_bytes()

    _, begun = converse(*launched(*wordlist, "run.seed=9", f'trainer.initial_weights="{policy}"'), [Publish()])
    assert begun.version == 0
    assert [t.checksum for t in begun.manifest.tensors] == [t.checksum for t in trained.manifest.tensors]
    assert torch.equal(fetched(begun.manifest)["output.weight"], stored["output.weight"].bfloat16())


def test_a_checkpoint_may_do_without_the_policy_for_others(launched, tmp_path):
    converse(*launched("checkpoints.huggingface=false"), [Save(step=0, path=str(tmp_path / "saved"))])
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["trainer"]


def reason_of_failure(composition: Composition, run_dir: RunDir, orders=()) -> str:
    """What the controller is told by a rank that cannot go on."""
    with pytest.raises(BaseExceptionGroup) as caught:
        converse(composition, run_dir, orders)
    reasons = [str(e) for e in caught.value.exceptions if isinstance(e, RunError) and "cannot go on" in str(e)]
    return "".join(reasons)


def test_a_checkpoint_of_another_model_is_reported_before_hello(launched, tmp_path):
    checkpoint = tmp_path / "step-0"
    converse(*launched(), [Save(step=0, path=str(checkpoint_dir.partial(checkpoint)))])
    commit_checkpoint(checkpoint, step=0)
    composition, run_dir = launched(f'checkpoints.resume="{checkpoint}"', 'tokenizer.characters="abc"')
    assert "is of another model: model/embedding.weight is (24, 12), here (4, 12)" in reason_of_failure(
        composition, run_dir
    )


def test_a_step_of_another_version_is_refused(launched):
    reason = reason_of_failure(*launched(), [train_step(3)])
    assert "step 4 trains version 3, and this rank holds 0" in reason


def test_a_damaged_checkpoint_is_reported_before_hello(launched, tmp_path):
    checkpoint = tmp_path / "step-0"
    converse(*launched(), [Save(step=0, path=str(checkpoint_dir.partial(checkpoint)))])
    commit_checkpoint(checkpoint, step=0)
    shards = checkpoint / "trainer" / "rank-0.safetensors"
    content = shards.read_bytes()
    shards.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    sentence = f"{shards} is damaged: its checksum is"
    assert sentence in reason_of_failure(*launched(f'checkpoints.resume="{checkpoint}"'))
