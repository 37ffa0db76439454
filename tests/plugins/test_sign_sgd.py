"""SignSGD from a config."""

from __future__ import annotations

import torch
from prl_sign_sgd import SignSgdConfig
from prl_sign_sgd.sign_sgd import build
from torch import nn


def test_one_step_by_hand_and_nothing_is_kept():
    network = nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    network.weight.grad = torch.tensor([[3.0, -2.0, 0.0], [0.1, 0.2, -9.0]])
    network.bias.grad = torch.tensor([1e-9, -1e9])
    optimizer = build(SignSgdConfig(weight_decay=0.5), network.named_parameters(), 0.1)
    optimizer.step()
    torch.testing.assert_close(
        network.weight.detach(), before["weight"] * 0.95 - 0.1 * torch.tensor([[1.0, -1, 0], [1, 1, -1]])
    )
    torch.testing.assert_close(network.bias.detach(), before["bias"] - 0.1 * torch.tensor([1.0, -1.0]))
    assert not optimizer.state


def test_frozen_parameters_are_left_out():
    network = nn.Linear(3, 2)
    network.bias.requires_grad_(False)
    assert [len(g["params"]) for g in build(SignSgdConfig(), network.named_parameters(), 0.1).param_groups] == [1]
