"""A simulated run in numbers: what a simulation returns."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class Figures:
    """Shares are between 0 and 1, lengths in sampled tokens."""

    steps: int
    seconds: float
    tokens_per_second: float
    """Sampled tokens of trained rollouts."""
    idle_trainer: float
    idle_engine: float
    """Share of the time in which an engine held no sequence, on average."""
    sequences: float
    """Sequences that decode on an engine, on average."""
    staleness: dict[int, float]
    """Share of the trained tokens by staleness, ascending."""
    staleness_mean: float
    dropped: dict[str, int]
    """Attempts at groups that were cut, lost or refused, by reason."""
    given_up: int
    """Groups whose task had no attempt left."""
    groups_trained: int
    tokens_wasted: float
    """Share of the sampled tokens that belong to rollouts that failed or were dropped."""
    length_issued: float
    """Mean tokens per rollout over all tasks, as their first attempt drew them: what no scheduler has touched."""
    length_trained: float
    length_dropped: float | None
    """Mean tokens per rollout of dropped attempts, had they come to their end; None where none was dropped."""
    queues: dict[str, float]
    """Mean entries: `ready` and `running` groups, `batches` formed ahead, `slots` (sequences that wait for one)."""

    @property
    def length_bias(self) -> float:
        """How much longer trained rollouts are than those of the tasks that were issued; below 0: shorter."""
        return self.length_trained / self.length_issued - 1.0

    @property
    def engine_seconds_per_token(self) -> float:
        """Seconds in which an engine computed, on average over engines, per trained token."""
        return (1.0 - self.idle_engine) / self.tokens_per_second
