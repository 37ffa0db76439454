"""The losses of prl_policy_gradient: the contract of every loss, and their formulas on numbers worked out by hand."""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from prl.testing import check_loss, loss_inputs
from prl.train.streams import LossBatch
from prl_policy_gradient import CrossEntropyConfig, DppoConfig, RefKLConfig, prl_losses
from prl_policy_gradient.losses import cross_entropy, dppo, ref_kl


def one_token(
    trainer: float, engine: float, *, advantage: float = 1.0, ref: float = 0.0, weight: float = 1.0
) -> LossBatch:
    """One sampled token; the trainer's log-probability asks for a gradient."""
    return LossBatch(
        trainer_logprobs=torch.tensor([math.log(trainer)], requires_grad=True),
        engine_logprobs=torch.tensor([math.log(engine)]),
        advantages=torch.tensor([advantage]),
        weights=torch.tensor([weight]),
        sample_ids=torch.tensor([0]),
        sample_count=1,
        staleness=torch.tensor([0]),
        ref_logprobs=torch.tensor([ref]),
    )


@pytest.mark.parametrize(
    ("function", "needs", "on_policy_gradient"),
    [
        (dppo(DppoConfig()), frozenset(), True),
        (dppo(DppoConfig(mask_low=0.0, mask_high=0.0, log_ratio_weight=1.0)), frozenset(), True),
        (cross_entropy(CrossEntropyConfig()), frozenset(), False),
        (ref_kl(RefKLConfig()), frozenset({"ref_logprobs"}), False),
    ],
    ids=["dppo", "dppo-strict", "cross_entropy", "ref_kl"],
)
def test_contract(function, needs, on_policy_gradient):
    check_loss(function, needs=needs, on_policy_gradient=on_policy_gradient)


def test_providers_declare_what_their_losses_read():
    assert {loss.name: loss.needs for loss in prl_losses()} == {
        "dppo": frozenset(),
        "cross_entropy": frozenset(),
        "ref_kl": frozenset({"ref_logprobs"}),
    }


def test_dppo_is_the_importance_weighted_gain_and_the_squared_log_ratio():
    inputs = one_token(0.3, 0.2, advantage=2.0, weight=3.0)
    output = dppo(DppoConfig(advantage_weight=0.5, log_ratio_weight=0.1))(inputs)
    log_ratio = math.log(0.3 / 0.2)
    assert output.loss.item() == pytest.approx(3.0 * (-0.5 * 2.0 * 1.5 + 0.1 * log_ratio**2), rel=1e-6)
    output.loss.backward()
    # The ratio is neither clipped nor detached: its derivative is the ratio itself.
    expected = 3.0 * (-0.5 * 2.0 * 1.5 + 2 * 0.1 * log_ratio)
    assert inputs.trainer_logprobs.grad.item() == pytest.approx(expected, rel=1e-6)
    assert output.metrics["ratio"].item() == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("trainer", "engine", "advantage", "masked"),
    [
        (0.61, 0.40, 1.0, True),  # risen too far, and should rise
        (0.59, 0.40, 1.0, False),
        (0.61, 0.40, -1.0, False),  # risen too far, and should fall: trained
        (0.40, 0.61, -1.0, True),  # fallen too far, and should fall
        (0.40, 0.59, -1.0, False),
        (0.40, 0.61, 1.0, False),  # fallen too far, and should rise: trained
        (0.40, 0.61, 0.0, True),  # no advantage counts as "should fall"
        (0.0020, 0.0001, 1.0, False),  # a ratio of 20, but hardly any probability moved
    ],
)
def test_dppo_masks_by_probability_difference(trainer, engine, advantage, masked):
    inputs = one_token(trainer, engine, advantage=advantage)
    output = dppo(DppoConfig(log_ratio_weight=1e-3))(inputs)
    assert output.metrics["masked"].item() == float(masked)
    output.loss.backward()
    regulariser = 2e-3 * math.log(trainer / engine)
    gain = 0.0 if masked else advantage * trainer / engine
    assert inputs.trainer_logprobs.grad.item() == pytest.approx(regulariser - gain, rel=1e-4)


def test_ref_kl_takes_the_reference_as_detached_advantage():
    inputs = one_token(0.5, 0.4, ref=math.log(0.25))
    output = ref_kl(RefKLConfig(log_ratio_weight=0.0))(inputs)
    output.loss.backward()
    excess = math.log(0.5 / 0.25)
    assert output.loss.item() == pytest.approx(excess * 0.5 / 0.4, rel=1e-6)
    assert inputs.trainer_logprobs.grad.item() == pytest.approx(excess * 0.5 / 0.4, rel=1e-6)
    assert output.metrics["kl"].item() == pytest.approx(excess, rel=1e-6)


def test_ref_kl_masks_tokens_that_fell():
    inputs = one_token(0.3, 0.6, ref=math.log(0.9))
    output = ref_kl(RefKLConfig())(inputs)
    output.loss.backward()
    assert output.metrics["masked"].item() == 1.0
    assert inputs.trainer_logprobs.grad.item() == pytest.approx(2e-3 * math.log(0.5), rel=1e-5)


def test_cross_entropy_is_the_weighted_negative_log_likelihood():
    inputs = loss_inputs(tokens=16, samples=2)
    output = cross_entropy(CrossEntropyConfig())(inputs)
    assert output.loss.item() == pytest.approx(-(inputs.weights * inputs.trainer_logprobs).sum().item(), rel=1e-6)
    assert output.metrics == {}


def test_metrics_count_only_tokens_of_the_stream():
    inputs = loss_inputs(tokens=32, samples=4)
    inside = inputs.weights != 0
    outside_differs = attrs.evolve(inputs, engine_logprobs=torch.where(inside, inputs.engine_logprobs, -9.0))
    assert 0 < inside.sum() < 32
    once, again = dppo(DppoConfig())(inputs), dppo(DppoConfig())(outside_differs)
    assert once.metrics["ratio"].item() == again.metrics["ratio"].item()
