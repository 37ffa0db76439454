"""The contract every loss must keep, and what makes this one CISPO."""

from __future__ import annotations

import math

import attrs
import torch
from prl.providers import LossOutput
from prl.testing import check_loss, loss_inputs
from prl.train.streams import LossBatch
from prl_cispo import CispoConfig
from prl_cispo.loss import build


def differentiate(inputs: LossBatch, config: CispoConfig) -> tuple[LossOutput, torch.Tensor]:
    logprobs = inputs.trainer_logprobs.clone().requires_grad_()
    output = build(config)(attrs.evolve(inputs, trainer_logprobs=logprobs))
    (gradient,) = torch.autograd.grad(output.loss, logprobs)
    return output, gradient


def test_keeps_the_contract_of_a_loss() -> None:
    check_loss(build(CispoConfig()), on_policy_gradient=True)


def test_a_ratio_above_the_bound_is_clipped_and_the_token_still_trains() -> None:
    inputs = loss_inputs(spread=1.0)
    output, gradient = differentiate(inputs, CispoConfig(clip_high=1.5))
    ratio = (inputs.trainer_logprobs - inputs.engine_logprobs).exp()
    above = (ratio > 1.5) & (inputs.weights != 0)
    expected = -inputs.weights * inputs.advantages * ratio.clamp(max=1.5)
    assert above.sum() > 3
    assert torch.allclose(gradient, expected)
    assert output.metrics["clipped"] == above.sum()


def test_the_ratio_carries_no_gradient() -> None:
    inputs = loss_inputs(spread=0.5)
    _, gradient = differentiate(inputs, CispoConfig(clip_high=math.inf))
    ratio = (inputs.trainer_logprobs - inputs.engine_logprobs).exp()
    assert torch.allclose(gradient, -inputs.weights * inputs.advantages * ratio)
