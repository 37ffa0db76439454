"""Muon from a config."""

from __future__ import annotations

import pytest
import torch
from prl_muon import MuonConfig
from prl_muon.muon import build, newton_schulz
from torch import nn


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    shapes = {
        "embed_tokens.weight": (7, 4),
        "layers.0.q.weight": (6, 4),
        "layers.0.experts.up": (3, 4, 5),
        "norm": (4,),
    }
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def test_singular_values_come_near_one():
    torch.manual_seed(1)
    for shape in ((6, 4), (4, 6), (3, 8, 5)):
        values = torch.linalg.svdvals(newton_schulz(torch.randn(shape), 8))
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_experts_of_a_stack_are_matrices_of_their_own():
    stack = torch.randn(3, 4, 5)
    together = newton_schulz(stack, 5)
    for index in range(3):
        torch.testing.assert_close(together[index], newton_schulz(stack[index], 5))


def test_one_step_by_hand():
    held = parameters()
    before = {name: p.detach().clone() for name, p in held.items()}
    for parameter in held.values():
        parameter.grad = torch.randn_like(parameter)
    config = MuonConfig(momentum=0.9, weight_decay=0.5)
    build(config, held.items(), 0.1).step()
    for name in ("layers.0.q.weight", "layers.0.experts.up"):
        grad, rows = held[name].grad, max(before[name].shape[-2:])
        ahead = grad * (1 - 0.9 + 0.9 * 0.1)  # (1 - m) g + m (1 - m) g
        moved = before[name] * (1 - 0.1 * 0.5) - 0.1 * 0.2 * rows**0.5 * newton_schulz(ahead, 5)
        torch.testing.assert_close(held[name].detach(), moved)
    adam = before["norm"] - 0.1 * held["norm"].grad.sign()
    torch.testing.assert_close(held["norm"].detach(), adam, atol=1e-5, rtol=1e-5)
    decayed = before["embed_tokens.weight"] * (1 - 0.1 * 0.5) - 0.1 * held["embed_tokens.weight"].grad.sign()
    torch.testing.assert_close(held["embed_tokens.weight"].detach(), decayed, atol=1e-5, rtol=1e-5)


def test_frozen_parameters_are_left_out():
    held = parameters()
    held["layers.0.q.weight"].requires_grad_(False)
    optimizer = build(MuonConfig(), held.items(), 0.1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3


@pytest.mark.parametrize("wrong", [{"momentum": 1.0}, {"iterations": 0}, {"betas": (0.9, 1.0)}, {"eps": 0.0}], ids=str)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        MuonConfig(**wrong)
