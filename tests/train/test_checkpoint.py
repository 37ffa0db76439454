"""A trainer that is saved, built again and restored continues bit for bit; anything else is refused with a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from prl import checkpoint_dir
from prl.errors import CheckpointError
from prl.train.checkpoint import TrainerState, file_names
from safetensors.torch import load_file
from torch import nn

from tests.train.tiny import build_model, build_stepper, commit_checkpoint, pack_batch, random_samples


def trainer(seed: int = 0, optimizer_class=torch.optim.AdamW, **settings) -> TrainerState:
    model = build_model(seed)
    optimizer = optimizer_class(model.parameters(), lr=0.0, **settings)
    return TrainerState(model=model, optimizer=optimizer, rank=0, world_size=1, seed=seed)


def train(state: TrainerState, steps: range) -> None:
    for step in steps:
        batch = pack_batch(random_samples(6, seed=step))
        build_stepper(state.model, state.optimizer).step(batch, batch.ranks[0], 0.01)


def save(state: TrainerState, path: Path) -> None:
    step = checkpoint_dir.step_of(path)
    state.snapshot(step=step, version=step).write(checkpoint_dir.partial(path))
    commit_checkpoint(path, step=step)


@pytest.mark.parametrize("settings", [{"fused": True}, {"amsgrad": True, "foreach": False}], ids=["fused", "amsgrad"])
def test_a_resumed_trainer_continues_bit_for_bit(tmp_path, settings):
    uninterrupted = trainer(**settings)
    train(uninterrupted, range(2))
    save(uninterrupted, tmp_path / "step-2")
    train(uninterrupted, range(2, 4))

    resumed = trainer(seed=9, **settings)
    assert resumed.load(tmp_path / "step-2") == 2
    train(resumed, range(2, 4))

    expected, seen = uninterrupted.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(seen[name], expected[name]) for name in expected)
    moments = [state.optimizer.state_dict()["state"] for state in (uninterrupted, resumed)]
    assert all(torch.equal(moments[0][i][k], moments[1][i][k]) for i in moments[0] for k in moments[0][i])


def test_a_checkpoint_before_the_first_step_restores_the_weights(tmp_path):
    saved, other = trainer(seed=1), trainer(seed=2)
    save(saved, tmp_path / "step-0")
    assert other.load(tmp_path / "step-0") == 0
    assert torch.equal(other.model.output.weight, saved.model.output.weight)


def test_the_shards_are_safetensors_under_readable_names(tmp_path):
    state = trainer()
    train(state, range(1))
    save(state, path := tmp_path / "step-1")
    tensors = load_file(path / "trainer" / "rank-0.safetensors")
    assert torch.equal(tensors["model/output.weight"], state.model.output.weight)
    assert torch.equal(tensors["model/scale"], torch.tensor(1.5))
    assert tensors["optimizer/output.weight/exp_avg"].shape == state.model.output.weight.shape
    assert tensors["optimizer/output.weight/step"].item() == 1.0
    record = json.loads((path / "trainer" / "rank-0.json").read_text())
    assert (record["step"], record["version"], record["world_size"]) == (1, 1, 1)


class CountingOptimizer(torch.optim.SGD):
    """Remembers a plain number per parameter, as some optimizers do."""

    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1


def test_optimizer_state_that_is_no_tensor_is_kept(tmp_path):
    state = trainer(optimizer_class=CountingOptimizer)
    train(state, range(3))
    save(state, tmp_path / "step-3")
    resumed = trainer(optimizer_class=CountingOptimizer)
    resumed.load(tmp_path / "step-3")
    assert [s["count"] for s in resumed.optimizer.state.values()] == [3] * len(list(state.model.parameters()))


# --- refusals ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def saved(tmp_path):
    state = trainer()
    train(state, range(1))
    save(state, tmp_path / "step-1")
    return tmp_path / "step-1"


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"step-9 is no complete checkpoint: it has no manifest\.json"):
        trainer().load(tmp_path / "step-9")


@pytest.mark.parametrize("name", ["rank-0.safetensors", "rank-0.json"])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_flipped_byte_anywhere(saved, name, place):
    path = saved / "trainer" / name
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"trainer/{name} is damaged: its checksum is \w+ where \w+ was written"):
        trainer().load(saved)


def test_a_file_cut_short(saved):
    path = saved / "trainer" / "rank-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"rank-0\.safetensors is damaged: it has \d+ bytes where \d+ were"):
        trainer().load(saved)


def test_a_missing_file(saved):
    (saved / "trainer" / "rank-0.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank-0\.safetensors is missing"):
        trainer().load(saved)


def test_a_snapshot_does_not_see_the_steps_that_follow(tmp_path):
    state = trainer(fused=True)
    train(state, range(1))
    before, at_once = state.snapshot(step=1, version=1), tmp_path / "at-once"
    state.snapshot(step=1, version=1).write(at_once)
    train(state, range(1, 3))
    before.write(tmp_path / "later")
    for name in file_names(0):
        assert (tmp_path / "later" / name).read_bytes() == (at_once / name).read_bytes()


def test_another_number_of_ranks_loads_the_same_bytes(saved):
    here, there = trainer(seed=5), trainer()
    there.load(saved)
    other = TrainerState(model=here.model, optimizer=here.optimizer, rank=1, world_size=2, seed=0)
    assert other.load(saved) == 1
    expected, seen = there.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(seen[name], expected[name]) for name in expected)


def test_another_optimizer(saved):
    with pytest.raises(CheckpointError, match="written with optimizer AdamW, here it is SGD"):
        trainer(optimizer_class=torch.optim.SGD).load(saved)


def test_another_model_leaves_this_one_untouched(saved):
    here = trainer(seed=5)
    here.model.output = nn.Linear(12, 24, bias=False)
    before = here.model.embedding.weight.clone()
    with pytest.raises(CheckpointError, match=r"model/output\.weight is \(23, 12\), here \(24, 12\)"):
        here.load(saved)
    assert torch.equal(here.model.embedding.weight, before)


def test_a_model_with_a_tensor_more(saved):
    here = trainer()
    here.model.register_buffer("extra", torch.zeros(2))
    with pytest.raises(CheckpointError, match=r"model/extra is not present, here \(2,\)"):
        here.load(saved)
