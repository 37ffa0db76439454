"""The main job with two and four trainer processes, experts and sequences divided over them, learns as with one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from prl.blocks.checkpoint import load
from prl.run_dir import RunDir
from prl_qwen3 import Qwen3Config
from prl_qwen3.network import build
from prl_qwen3.weights import weight_map

from tests.end_to_end.live import TINY, Run, prl

MESHES = {
    "one": (),
    "context2": ("trainer.ranks=2", "trainer.context=2"),
    "shard4 expert2": ("trainer.ranks=4", "trainer.expert=2"),
}
WARMUP, STEPS = 8, 2
EDITS = (
    "model.experts=4",
    "model.expert_intermediate_size=32",
    f"warmup.steps={WARMUP}",
    f"run.steps={STEPS}",
    "scheduler.max_staleness=0",
    "evaluation.every=0",
    "trackers=[]",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("meshes")
    config = folder / "tiny.toml"
    config.write_text(TINY)

    def finished(name: str) -> Run:
        directory = folder / name.replace(" ", "-")
        words = [word for edit in (f"run.dir={directory}", *EDITS, *MESHES[name]) for word in ("--set", edit)]
        done = prl("launch", str(config), *words)
        assert done.returncode == 0, done.stderr
        return Run(dir=RunDir(directory))

    with ThreadPoolExecutor() as pool:
        return dict(zip(MESHES, pool.map(finished, MESHES), strict=True))


@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "one"])
def test_it_learns_as_with_one(runs: dict[str, Run], mesh: str) -> None:
    alone, divided = (runs[name].steps for name in ("one", mesh))
    assert [line["step"] for line in divided] == list(range(1, WARMUP + STEPS + 1))
    for expected, seen in zip(alone[:WARMUP], divided[:WARMUP], strict=True):
        assert seen["tokens/trained"] == expected["tokens/trained"]
        assert seen["loss/ce"] == pytest.approx(expected["loss/ce"], rel=1e-3)
        assert seen["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)
    assert divided[WARMUP - 1]["loss/ce"] < divided[0]["loss/ce"]
    # Rollouts are sampled from the published shares: were one of them wrong, engine and trainer would disagree.
    assert max(line["mismatch/k3_fresh"] for line in runs[mesh].rl_steps) < 1e-8


def test_the_exported_shares_are_one_policy(runs: dict[str, Run]) -> None:
    checkpoint = runs["shard4 expert2"].checkpoint
    assert len(list((checkpoint / "huggingface").glob("model-*-of-00004.safetensors"))) == 4
    config = Qwen3Config(checkpoint=str(checkpoint / "huggingface"))
    load(build(config, 0), weight_map(config, 0), checkpoint / "huggingface")
