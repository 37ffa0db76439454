"""The main job with two and four trainer processes, experts and sequences divided over them, learns as with one.

Words of three letters and a small mixture of experts, so that one process solves a quarter of the held-out tasks after
seconds. benchmarks/meshes_learn.py does the same at the size of the main job, on more meshes.
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from prl.blocks.checkpoint import load
from prl.run_dir import RunDir
from prl_qwen3 import Qwen3Config
from prl_qwen3.network import build
from prl_qwen3.weights import weight_map

from tests.end_to_end.live import ROOT, Run, launched

SPELL = ROOT / "configs" / "spell_backward.toml"
MESHES = {
    "one": (),
    "shard2": ("trainer.ranks=2",),
    "context2": ("trainer.ranks=2", "trainer.context=2"),
    "shard4 expert2": ("trainer.ranks=4", "trainer.expert=2"),
}
WARMUP, STEPS = 112, 8
THRESHOLD = 0.15
"""Of held-out tasks solved; who guesses letters solves none in 17,000."""
EDITS = (
    "environments.0.parameters.max_word_len=3",
    "model.hidden_size=64",
    "model.intermediate_size=128",
    "model.layers=2",
    "model.head_dim=16",
    "model.experts=4",
    "model.expert_intermediate_size=64",
    f"warmup.steps={WARMUP}",
    "warmup.learning_rate=3e-3",
    f"run.steps={STEPS}",
    "optimizer.learning_rate=4e-4",
    "scheduler.max_staleness=0",
    "evaluation.every=1000",
    "trackers=[]",
)
PATIENCE = 1500.0
"""Seconds; two idle cores take a tenth of it."""
EXACT = 6
"""Steps over which rounding alone does not grow."""

each_mesh = pytest.mark.parametrize("mesh", [name for name in MESHES if name != "one"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("meshes")
    with ExitStack() as stack:
        begun = {
            name: stack.enter_context(
                launched(SPELL, folder / name.replace(" ", "-"), *EDITS, *edits, words=("--plugins", "no:console"))
            )
            for name, edits in MESHES.items()
        }
        ended = {name: run.end(PATIENCE) for name, run in begun.items()}
    assert {name: code for name, (code, _) in ended.items()} == dict.fromkeys(MESHES, 0), ended
    return {name: Run(dir=RunDir(run.dir.path)) for name, run in begun.items()}


@pytest.mark.parametrize("mesh", MESHES)
def test_it_solves_held_out_tasks_as_one_process_does(runs: dict[str, Run], mesh: str) -> None:
    evaluations = [line for line in runs[mesh].lines if line["phase"] == "eval"]
    assert evaluations[-1]["eval/version"] == WARMUP + STEPS
    assert evaluations[-1]["eval/spell_backward/accuracy"] >= THRESHOLD
    rewards = [line["reward/mean"] for line in runs[mesh].rl_steps]
    assert sum(rewards) / len(rewards) >= THRESHOLD / 2


@each_mesh
def test_it_computes_what_one_process_computes(runs: dict[str, Run], mesh: str) -> None:
    alone, divided = (runs[name].steps for name in ("one", mesh))
    assert [line["step"] for line in divided] == list(range(1, WARMUP + STEPS + 1))
    for expected, seen in zip(alone[:EXACT], divided[:EXACT], strict=True):
        assert seen["tokens/trained"] == expected["tokens/trained"]
        assert seen["loss/ce"] == pytest.approx(expected["loss/ce"], rel=1e-3)
        assert seen["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)
    # Rollouts are sampled from the published shares: were one of them wrong, engine and trainer would disagree.
    assert max(line["mismatch/k3_fresh"] for line in runs[mesh].rl_steps) < 1e-8
    assert min(line["routes/replayed"] for line in runs[mesh].rl_steps) == 1.0


def test_the_exported_shares_are_one_policy(runs: dict[str, Run]) -> None:
    checkpoint = runs["shard4 expert2"].checkpoint
    assert len(list((checkpoint / "huggingface").glob("model-*-of-00004.safetensors"))) == 4
    config = Qwen3Config(checkpoint=str(checkpoint / "huggingface"))
    load(build(config, 0), weight_map(config, 0), checkpoint / "huggingface")
