"""Weights that a family freezes or keeps exact, through a step, a checkpoint and a publication."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from prl import checkpoint_dir
from prl.blocks.decoder import Decoder
from prl.train.checkpoint import TrainerState
from prl.train.export import Exporter, Shares
from prl_adamw import AdamWConfig
from prl_adamw.adamw import build as adamw
from prl_glm5 import Glm51Config
from prl_glm5.network import build
from prl_glm5.weights import weight_map
from prl_native import Bf16Config
from prl_native.formats import bf16
from torch import Tensor

from tests.train.tiny import VOCAB, build_stepper, commit_checkpoint, pack_batch, random_samples

CONFIG = Glm51Config(layers=2, index_top_k=4)


def trainer(seed: int = 0) -> TrainerState:
    torch.manual_seed(seed)
    model = build(CONFIG, VOCAB)
    return TrainerState(
        model=model,
        optimizer=adamw(AdamWConfig(), model.named_parameters(), 0.01),
        rank=0,
        world_size=1,
        seed=seed,
    )


def step(state: TrainerState, number: int) -> None:
    batch = pack_batch(random_samples(6, seed=number))
    build_stepper(state.model, state.optimizer).step(batch, batch.ranks[0], 0.01)


def values(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_step_moves_everything_but_the_indexer_and_the_correction() -> None:
    state = trainer()
    before = values(state.model)
    step(state, 1)
    still = {name for name, tensor in state.model.state_dict().items() if torch.equal(tensor, before[name])}
    assert still == {name for name in before if ".indexer." in name or name.endswith("e_score_correction_bias")}


def test_a_resumed_trainer_continues_bit_for_bit(tmp_path: Path) -> None:
    saved, resumed = trainer(), trainer(seed=9)
    step(saved, 1)
    path = tmp_path / "step-1"
    saved.snapshot(step=1, version=1).write(checkpoint_dir.partial(path))
    commit_checkpoint(path, step=1)
    assert resumed.load(path) == 1
    for state in (saved, resumed):
        step(state, 2)
    expected = values(saved.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.model.state_dict().items())


class Seen:
    """A `prl.providers.WeightSender` that keeps what it is sent."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def send(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.tensors = {name: tensor.clone() for name, tensor in tensors}


def test_frozen_weights_are_published_and_exact_ones_are_not_rounded() -> None:
    model: Decoder = build(CONFIG, VOCAB)
    bias = model.get_buffer("layers.1.mlp.gate.e_score_correction_bias")
    bias.copy_(40 + torch.arange(8) * 2**-12)
    sender = Seen()
    Exporter(
        shares=Shares(model=model, weight_map=weight_map(CONFIG, VOCAB)),
        number_format=bf16(Bf16Config()),
        sender=sender,
        float32=("e_score_correction_bias",),
    ).publish(1)
    stem = "model.layers.1"
    assert torch.equal(sender.tensors[f"{stem}.mlp.gate.e_score_correction_bias"], bias)
    index = model.get_parameter("layers.1.self_attn.indexer.wk.weight")
    assert torch.equal(sender.tensors[f"{stem}.self_attn.indexer.wk.weight"], index.bfloat16())
