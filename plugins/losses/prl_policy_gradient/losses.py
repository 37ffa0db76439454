"""The formulas. Notation: d = trainer - engine log-probability of a token, ratio = e^d, p = its probability.

Every loss is a sum of weight x per-token loss over tokens of weight other than 0; tokens of weight 0 are replaced
before anything is computed from them, so that no value of theirs can reach the gradient.
"""

from __future__ import annotations

import torch
from prl.providers import LossFunction, LossInputs, LossOutput
from torch import Tensor

from prl_policy_gradient import CrossEntropyConfig, DppoConfig, RefKLConfig

LARGEST_LOG_RATIO = 20.0
"""Where the exponential stops growing (e^20 = 5e8): a guard against overflow, far outside every mask."""


def dppo(config: DppoConfig) -> LossFunction:
    """DPPO with the binary total-variation mask, and a squared log-ratio.

        loss = -keep * advantage_weight * A * ratio + log_ratio_weight * d^2
        keep = 0 where A > 0 and p_trainer - p_engine > mask_high, or A <= 0 and p_trainer - p_engine < -mask_low

    The mask is that of Qi et al. 2026, "Rethinking the Trust Region in LLM Reinforcement Learning" (arXiv 2602.04879):
    a token that has already moved far in the direction its advantage asks for is not pushed further. The ratio is
    neither clipped nor detached, which makes this the exact importance-weighted policy gradient. The squared log-ratio
    holds the policy near the one that sampled, as in Kimi K1.5 and K2.5 (arXiv 2501.12599, 2602.02276); masked tokens
    keep it. Defaults are prime-rl's.
    """

    def loss(inputs: LossInputs) -> LossOutput:
        log_ratio, ratio = _ratio(inputs)
        moved = _moved(inputs)
        masked = torch.where(inputs.advantages > 0, moved > config.mask_high, moved < -config.mask_low)
        gain = torch.where(masked, 0.0, config.advantage_weight * inputs.advantages * ratio)
        return _output(
            inputs,
            config.log_ratio_weight * log_ratio.square() - gain,
            masked=masked,
            ratio=ratio,
        )

    return loss


def ref_kl(config: RefKLConfig) -> LossFunction:
    """Reverse KL to a reference policy on the policy's own samples: on-policy distillation.

        loss = -keep * (ref_logprob - trainer_logprob) * ratio + log_ratio_weight * d^2,   the parenthesis detached
        keep = 0 where p_trainer - p_engine < -mask_low

    Agarwal et al. 2024, "On-Policy Distillation of Language Models" (arXiv 2306.13649), in policy-gradient form: the
    log-probability the reference gives over the policy's own is the advantage of each token. Defaults are prime-rl's.
    """

    def loss(inputs: LossInputs) -> LossOutput:
        if inputs.ref_logprobs is None:
            raise ValueError("ref_kl was called without ref_logprobs, which its provider declares in `needs`")
        log_ratio, ratio = _ratio(inputs)
        masked = _moved(inputs) < -config.mask_low
        excess = _in_stream(inputs, inputs.trainer_logprobs.detach() - inputs.ref_logprobs)
        cost = torch.where(masked, 0.0, excess * ratio)
        return _output(
            inputs,
            cost + config.log_ratio_weight * log_ratio.square(),
            masked=masked,
            kl=excess,
        )

    return loss


def cross_entropy(config: CrossEntropyConfig) -> LossFunction:
    """Negative log-likelihood: loss = -log p."""

    def loss(inputs: LossInputs) -> LossOutput:
        return _output(inputs, -_in_stream(inputs, inputs.trainer_logprobs))

    return loss


def _in_stream(inputs: LossInputs, values: Tensor) -> Tensor:
    """[N] `values` where the token belongs to the stream, 0 (and no gradient) elsewhere."""
    return torch.where(inputs.weights != 0, values, 0.0)


def _ratio(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """([N] d, [N] e^d), both with gradient."""
    log_ratio = _in_stream(inputs, inputs.trainer_logprobs - inputs.engine_logprobs)
    return log_ratio, log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()


def _moved(inputs: LossInputs) -> Tensor:
    """[N] p_trainer - p_engine, detached: how far the token's probability has moved since it was sampled."""
    return _in_stream(inputs, inputs.trainer_logprobs.detach().exp() - inputs.engine_logprobs.exp())


def _output(inputs: LossInputs, per_token: Tensor, **metrics: Tensor) -> LossOutput:
    """Weigh and sum; each metric [N] is summed over the tokens of the stream."""
    in_stream = inputs.weights != 0
    return LossOutput(
        loss=(inputs.weights * per_token).sum(),
        metrics={name: value.detach()[in_stream].sum() for name, value in metrics.items()},
    )
