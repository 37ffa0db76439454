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


@pytest.mark.parametrize(
    "wrong", [{"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.9)}, {"eps": 0.0}, {"weight_decay": -1.0}], ids=str
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        AdamWConfig(**wrong)
