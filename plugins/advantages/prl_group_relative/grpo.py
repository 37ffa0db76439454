"""GRPO's advantage: what a rollout earned above the mean of its siblings."""

from __future__ import annotations

import statistics

from prl.providers import AdvantageFunction
from prl.types import Group

from prl_group_relative import GrpoConfig

_EPSILON = 1e-6


def advantages(group: Group, *, normalize: bool) -> list[float]:
    """One number per rollout: `r - mean(r)`, or `(r - mean(r)) / (std(r) + 1e-6)` when normalised.

    Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300, section 4.1) divide by the standard deviation; Liu et al. 2025
    (Dr. GRPO, arXiv 2503.20783) show that this favours questions that are nearly always or nearly never solved, and
    leave it out, as prime-rl does. Equal rewards give exactly 0, free of rounding.
    """
    rewards = group.rewards
    if not rewards or min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    scale = statistics.pstdev(rewards, mean) + _EPSILON if normalize else 1.0
    return [(reward - mean) / scale for reward in rewards]


def build(config: GrpoConfig) -> AdvantageFunction:
    def grpo(group: Group) -> list[float]:
        return advantages(group, normalize=config.normalize)

    return grpo
