"""A group becomes samples: what the advantage plugin says of each rollout, laid onto its sampled tokens.

Called by the controller when a batch is formed. Knows nothing of versions, packing or losses. Every rollout becomes a
sample, those with advantage 0 too: they add nothing to the policy gradient, but the loss's regulariser acts on them,
and the mismatch between trainer and engine is measured over all sampled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import attrs
import numpy as np

from prl.errors import RunError
from prl.providers import AdvantageFunction
from prl.types import Float32, Group, Rollout, Sample


@attrs.frozen(kw_only=True)
class Scored:
    """A group with its credit: `samples[i]` and `advantages[i]` (mean over sampled tokens) belong to rollout `i`."""

    group: Group
    samples: tuple[Sample, ...]
    advantages: tuple[float, ...]


def score(group: Group, advantage: AdvantageFunction) -> Scored:
    """Ask for the group's advantages and make one sample of the rl stream of each rollout.

    Raises RunError when the plugin's answer does not fit the group or is not finite.
    """
    answer: Sequence[float | Sequence[float]] = advantage(group)
    if len(answer) != len(group.rollouts):
        raise RunError(
            f"the advantage plugin gave {len(answer)} values for the {len(group.rollouts)} rollouts of "
            f"group {group.group_id}; it must give one per rollout"
        )
    samples = tuple(_sample(r, _per_token(value, r)) for value, r in zip(answer, group.rollouts, strict=True))
    return Scored(group=group, samples=samples, advantages=tuple(_mean_advantage(sample) for sample in samples))


def _per_token(value: float | Sequence[float], rollout: Rollout) -> Float32:
    """[L] the advantage of every token, 0 where nothing was sampled."""
    column = np.full(len(rollout.tokens), value) if isinstance(value, Real) else np.asarray(value)
    if column.shape != rollout.tokens.shape:
        raise RunError(
            f"the advantage plugin gave {column.size} values for the {len(rollout.tokens)} tokens of rollout "
            f"{rollout.rollout_id}; it must give one number per rollout or one per token"
        )
    if not np.isfinite(column).all():
        raise RunError(f"the advantage plugin gave a value that is not finite for rollout {rollout.rollout_id}")
    return np.where(rollout.sampled, column, 0.0).astype(np.float32)


def _mean_advantage(sample: Sample) -> float:
    sampled = sample.advantages[sample.sampled]
    return float(sampled.mean()) if sampled.size else 0.0


def _sample(rollout: Rollout, advantages: Float32) -> Sample:
    return Sample(
        tokens=rollout.tokens,
        sampled=rollout.sampled,
        engine_logprobs=rollout.logprobs,
        versions=rollout.versions,
        advantages=advantages,
        temperature=rollout.temperature,
        weights={"rl": rollout.sampled.astype(np.float32)},
        large=rollout.large,
    )
