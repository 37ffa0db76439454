"""AdamW from a config."""

from __future__ import annotations

import pytest
import torch
from prl_adamw import AdamWConfig
from prl_adamw.adamw import build
from torch import nn


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def moved(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters after one step on a gradient of ones."""
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def test_one_step_by_hand():
    network = model()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    config = AdamWConfig(learning_rate=9.0, weight_decay=0.5, eps=0.25)
    after = moved(build(config, network.named_parameters(), 0.1), network)
    # The first step of Adam on a gradient of ones is learning_rate / (1 + eps); only the matrix decays.
    assert after["weight"] == pytest.approx(before["weight"] * (1 - 0.1 * 0.5) - 0.1 / 1.25)
    assert after["bias"] == pytest.approx(before["bias"] - 0.1 / 1.25)


def test_config_reaches_every_group():
    optimizer = build(AdamWConfig(betas=(0.8, 0.9), eps=1e-6), model().named_parameters(), 0.1)
    assert [g["betas"] for g in optimizer.param_groups] == [(0.8, 0.9)] * 2
    assert [g["eps"] for g in optimizer.param_groups] == [1e-6] * 2
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.0]
    assert all(g["fused"] for g in optimizer.param_groups)


def test_frozen_parameters_are_left_out():
    network = model()
    network.bias.requires_grad_(False)
    optimizer = build(AdamWConfig(), network.named_parameters(), 0.1)
    assert [len(g["params"]) for g in optimizer.param_groups] == [1]


# --- parameters in bfloat16 ------------------------------------------------------------------------------------------
def test_steps_too_small_for_bfloat16_add_up():
    """From 1.0 the next bfloat16 is 2^-7 away: eight steps of 2^-9 reach two of them."""
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    optimizer = build(AdamWConfig(weight_decay=0.0), [("weight", weight)], 2**-9)
    seen = []
    for _ in range(8):
        weight.grad = -torch.ones_like(weight)
        optimizer.step()
        seen.append(weight[0, 0].item())
    assert seen[0] == 1.0
    assert seen[-1] == 1.0 + 2**-6
    assert optimizer.state[weight]["copy"][0, 0].item() == pytest.approx(1.0 + 8 * 2**-9)


def test_copies_move_as_float32_parameters_would():
    narrow, wide = model().bfloat16(), model().bfloat16().float()
    optimizers = [build(AdamWConfig(), network.named_parameters(), 0.01) for network in (narrow, wide)]
    for _ in range(3):
        for network, optimizer in zip((narrow, wide), optimizers, strict=True):
            moved(optimizer, network)
    for name, parameter in narrow.named_parameters():
        copy = optimizers[0].state[parameter]["copy"]
        assert copy.equal(wide.get_parameter(name))
        assert parameter.equal(copy.bfloat16())


def test_a_loaded_state_keeps_every_bit_of_its_copies():
    network = model().bfloat16()
    optimizer = build(AdamWConfig(), network.named_parameters(), 0.01)
    moved(optimizer, network)
    other = build(AdamWConfig(), network.named_parameters(), 0.01)
    other.load_state_dict(optimizer.state_dict())
    for parameter in network.parameters():
        for key in ("copy", "exp_avg", "exp_avg_sq", "step"):
            assert other.state[parameter][key].dtype == torch.float32
            assert other.state[parameter][key].equal(optimizer.state[parameter][key])


@pytest.mark.parametrize(
    "wrong", [{"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.9)}, {"eps": 0.0}, {"weight_decay": -1.0}], ids=str
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        AdamWConfig(**wrong)
