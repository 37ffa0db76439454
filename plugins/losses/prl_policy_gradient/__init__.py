"""Losses over log-probabilities: DPPO for reinforcement, cross-entropy for demonstrations, KL to a reference."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from attrs import validators
from prl import hookimpl, option
from prl.compose.config import LossConfig
from prl.providers import Loss

not_negative = validators.ge(0)


@attrs.frozen(kw_only=True)
class DppoConfig(LossConfig):
    """`[losses.rl]` with `type = "dppo"`."""

    mask_low: float = option(
        0.2, help="largest fall of a token's probability at which it is still pushed down", validator=not_negative
    )
    mask_high: float = option(
        0.2, help="largest rise of a token's probability at which it is still pushed up", validator=not_negative
    )
    advantage_weight: float = option(1.0, help="factor of the advantages", validator=not_negative)
    log_ratio_weight: float = option(1e-3, help="weight of the squared log-ratio", validator=not_negative)


@attrs.frozen(kw_only=True)
class CrossEntropyConfig(LossConfig):
    """`[losses.ce]` with `type = "cross_entropy"`."""


@attrs.frozen(kw_only=True)
class RefKLConfig(LossConfig):
    """`[losses.ref_kl]` with `type = "ref_kl"`."""

    mask_low: float = option(
        0.2, help="largest fall of a token's probability at which it is still trained", validator=not_negative
    )
    log_ratio_weight: float = option(1e-3, help="weight of the squared log-ratio", validator=not_negative)


@hookimpl
def prl_losses() -> Iterable[Loss]:
    yield Loss(
        name="dppo",
        config=DppoConfig,
        summary="importance-weighted policy gradient, masked by probability difference (DPPO)",
        build="prl_policy_gradient.losses:dppo",
    )
    yield Loss(
        name="cross_entropy",
        config=CrossEntropyConfig,
        summary="negative log-likelihood",
        build="prl_policy_gradient.losses:cross_entropy",
    )
    yield Loss(
        name="ref_kl",
        config=RefKLConfig,
        summary="reverse KL divergence to a reference policy (on-policy distillation)",
        build="prl_policy_gradient.losses:ref_kl",
        needs=frozenset({"ref_logprobs"}),
    )
