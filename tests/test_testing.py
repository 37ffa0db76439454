"""The contract kit must catch the mistakes authors make, and say which."""

from __future__ import annotations

import pytest
import torch
from prl.providers import LossInputs, LossOutput
from prl.testing import check_loss, loss_inputs


def policy_gradient(inputs: LossInputs) -> LossOutput:
    return LossOutput(loss=-(inputs.weights * inputs.advantages * inputs.trainer_logprobs).sum())


def mean_instead_of_sum(inputs: LossInputs) -> LossOutput:
    return LossOutput(loss=-(inputs.weights * inputs.advantages * inputs.trainer_logprobs).mean())


def ignores_weights(inputs: LossInputs) -> LossOutput:
    return LossOutput(loss=-(inputs.advantages * inputs.trainer_logprobs).sum())


def weight_as_mask(inputs: LossInputs) -> LossOutput:
    return LossOutput(loss=-((inputs.weights != 0) * inputs.advantages * inputs.trainer_logprobs).sum())


def depends_on_position(inputs: LossInputs) -> LossOutput:
    earlier = inputs.sample_ids.float() + 1
    return LossOutput(loss=-(inputs.weights * earlier * inputs.trainer_logprobs).sum())


def explodes(inputs: LossInputs) -> LossOutput:
    log_ratio = torch.where(inputs.weights != 0, inputs.trainer_logprobs - inputs.engine_logprobs, 0.0)
    return LossOutput(loss=-(inputs.weights * inputs.advantages * (2 * log_ratio).exp()).sum())


def attached_metric(inputs: LossInputs) -> LossOutput:
    output = policy_gradient(inputs)
    return LossOutput(loss=output.loss, metrics={"loss": output.loss})


def vector_metric(inputs: LossInputs) -> LossOutput:
    return LossOutput(loss=policy_gradient(inputs).loss, metrics={"weights": inputs.weights})


def mean_metric(inputs: LossInputs) -> LossOutput:
    return LossOutput(loss=policy_gradient(inputs).loss, metrics={"weight": inputs.weights.mean()})


def vector_loss(inputs: LossInputs) -> LossOutput:
    return LossOutput(loss=-inputs.weights * inputs.trainer_logprobs)


def detached_loss(inputs: LossInputs) -> LossOutput:
    return LossOutput(loss=policy_gradient(inputs).loss.detach())


def twice_too_strong(inputs: LossInputs) -> LossOutput:
    return LossOutput(loss=2 * policy_gradient(inputs).loss)


def test_a_correct_loss_passes():
    check_loss(policy_gradient, on_policy_gradient=True)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (mean_instead_of_sum, "SUM over tokens, never a mean"),
        (ignores_weights, "tokens of weight 0 have a gradient"),
        (weight_as_mask, "weights must multiply"),
        (depends_on_position, "do not add up"),
        (explodes, r"not finite where the ratio is e\^80"),
        (attached_metric, "carries a gradient"),
        (vector_metric, r"metric 'weights' must be one number"),
        (mean_metric, "metrics are sums too"),
        (vector_loss, "the loss must be one number"),
        (detached_loss, "carries no gradient"),
        (twice_too_strong, "must be -weight x advantage"),
    ],
)
def test_each_mistake_is_named(function, sentence):
    with pytest.raises(AssertionError, match=sentence):
        check_loss(function, on_policy_gradient=True)


def test_optional_inputs_come_only_when_asked_for():
    assert loss_inputs().entropy is None
    assert loss_inputs(needs=frozenset({"entropy", "ref_logprobs"})).entropy.shape == (64,)


def test_equal_seeds_give_equal_inputs():
    assert torch.equal(loss_inputs(seed=3).trainer_logprobs, loss_inputs(seed=3).trainer_logprobs)
    assert not torch.equal(loss_inputs(seed=3).trainer_logprobs, loss_inputs(seed=4).trainer_logprobs)
