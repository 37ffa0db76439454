"""Two ranks under the elastic agent (FSDP2 on gloo) against one process: gradients, sums, weights, checkpoints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from prl.blocks.checkpoint import load
from prl.errors import CheckpointError
from prl.train.agent import launch
from safetensors.torch import load_file

from tests.train.tiny import (
    MODELS,
    GradientRecorder,
    build_model,
    build_qwen3,
    build_stepper,
    gradients_of,
    pack_batch,
    qwen3_map,
    random_samples,
    relative_difference,
)

RANKS = 2
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the ranks left behind; they run once for all tests of this file."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        assert launch([sys.executable, "-m", "tests.train.rank_program", str(folder)], ranks=RANKS) == 0
    return folder


@pytest.fixture(scope="module")
def reports(folder):
    return [json.loads((folder / f"tiny-{rank}.json").read_text()) for rank in range(RANKS)]


def test_the_work_was_shared_and_one_rank_had_an_empty_micro_batch(reports):
    (some, more) = sorted((r["sizes"] for r in reports), key=min)
    assert len(some) == len(more) == 2
    assert min(some) == 0 < max(some)
    assert min(more) > 0
    assert [r["shard"] for r in reports] == [[12, 12], [11, 12]]


@pytest.mark.parametrize("model_name", MODELS)
def test_the_number_of_ranks_does_not_change_the_gradient(folder, model_name):
    expected = gradients_of(pack_batch(random_samples(3)), model_name=model_name)
    assert relative_difference(load_file(folder / f"{model_name}-gradients.safetensors"), expected) < 1e-5


def test_sums_of_the_ranks_add_up_and_the_norm_is_global(reports):
    batch = pack_batch(random_samples(3))
    model = build_model()
    report = build_stepper(model, GradientRecorder(model.named_parameters())).step(batch, batch.ranks[0], 0.0)
    added = {name: sum(r["sums"].get(name, 0.0) for r in reports) for name in report.sums}
    assert added == pytest.approx(dict(report.sums), rel=1e-5)
    assert [r["grad_norm"] for r in reports] == pytest.approx([report.values["grad_norm"]] * RANKS, rel=1e-5)


@pytest.mark.parametrize("files", ["published-*.safetensors", "huggingface/model-*.safetensors"])
def test_every_rank_has_a_share_and_together_they_are_the_model(folder, files):
    first, second = (load_file(file) for file in sorted(folder.glob(files)))
    model = MODELS["qwen3_moe"]()
    expected = dict(pair for item in model.state_dict().items() for pair in qwen3_map().to_hf(*item))
    assert not first.keys() & second.keys()
    together = first | second
    assert together.keys() == expected.keys()
    assert all(torch.equal(together[name], expected[name]) for name in expected)
    sizes = [sum(tensor.nbytes for tensor in share.values()) for share in (first, second)]
    assert max(sizes) < 0.6 * sum(sizes)


def test_the_shares_are_a_checkpoint_that_one_process_loads(folder):
    loaded, expected = build_qwen3(seed=5, experts=4), MODELS["qwen3_moe"]().state_dict()
    load(loaded, qwen3_map(), folder / "huggingface")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    (folder / "huggingface" / "model-00002-of-00002.safetensors").rename(folder / "elsewhere")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors cannot be read"):
        load(loaded, qwen3_map(), folder / "huggingface")


def test_resumed_ranks_continue_bit_for_bit(folder):
    resumed, uninterrupted = load_file(folder / "resumed.safetensors"), load_file(folder / "uninterrupted.safetensors")
    assert not torch.equal(uninterrupted["output.weight"], build_model().output.weight)
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)


@pytest.mark.parametrize("divided", ["shard", "expert"])
def test_muon_moves_divided_matrices_as_whole_ones(folder, divided):
    """A step moves a weight by about 0.002; iterations make more of what differs in the gradients."""
    assert all(json.loads((folder / f"muon-{rank}.json").read_text())[divided] < 1e-5 for rank in range(RANKS))
