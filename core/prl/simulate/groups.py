"""Groups without columns: what a scheduler may ask about one, at a cost that does not grow with its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np

from prl.types import Group, Rollout

_TOKENS = np.zeros(0, dtype=np.int32)
_SAMPLED = np.zeros(0, dtype=np.bool_)
_LOGPROBS = np.zeros(0, dtype=np.float32)


@attrs.frozen(kw_only=True)
class SimulatedRollout(Rollout):
    """Its columns are empty; counts and versions come from `runs`.

    Example:
        >>> rollout = simulated("7.0", [(3, 100), (4, 20)])
        >>> rollout.sampled_count, rollout.oldest_version
        (120, 3)
    """

    runs: tuple[tuple[int, int], ...]
    """(version, tokens it sampled), oldest first."""

    @property
    def sampled_count(self) -> int:
        return sum(count for _, count in self.runs)

    @property
    def oldest_version(self) -> int:
        return self.runs[0][0]


@attrs.frozen(kw_only=True)
class SimulatedGroup(Group):
    rollouts: tuple[SimulatedRollout, ...]

    @property
    def sampled_count(self) -> int:
        return sum(rollout.sampled_count for rollout in self.rollouts)


def simulated(rollout_id: str, runs: Sequence[tuple[int, int]]) -> SimulatedRollout:
    """A finished rollout of at least one token."""
    return SimulatedRollout(
        rollout_id=rollout_id,
        tokens=_TOKENS,
        sampled=_SAMPLED,
        logprobs=_LOGPROBS,
        versions=_TOKENS,
        temperature=1.0,
        turns=(),
        messages=(),
        reward=0.0,
        runs=tuple(runs),
    )
