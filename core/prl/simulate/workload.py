"""What rollouts cost: lengths, environment seconds and failures, drawn by issue number.

Every draw is a hash of seed, group and attempt, so two simulations that differ in one setting see the same tasks: their
difference is the setting's. A task keeps its nature over its attempts: what was long is long again. Knows nothing of
time or of schedulers. Called by the loop when a group starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log, sqrt
from random import Random
from typing import NamedTuple, Protocol

import attrs

from prl.dispatch.permutation import mix

_TASK, _ATTEMPT = 1, 2  # streams of one seed


class RolloutPlan(NamedTuple):
    """One rollout before it starts. A tuple, because hundreds of thousands are made."""

    tokens: int
    """It will sample so many, or had before it failed."""
    latency: float
    """Seconds in the environment after its last token."""
    fails: bool


class Lengths(Protocol):
    """Sampled tokens per rollout."""

    def draw(self, task: Random, attempt: Random, size: int) -> Sequence[int]:
        """Lengths >= 1 of `size` siblings; `task` is seeded alike for all attempts at a group."""


@attrs.frozen(kw_only=True)
class LognormalLengths:
    """Lognormal lengths whose logarithms correlate between siblings: some tasks are long, and so are some tries."""

    mean: float
    """Tokens, before `most` cuts."""
    sigma: float
    """Standard deviation of the logarithm."""
    correlation: float
    """Share of the variance that belongs to the task, 0 to 1."""
    most: int
    """Longer rollouts are truncated here (`rollouts.max_tokens`)."""

    def draw(self, task: Random, attempt: Random, size: int) -> list[int]:
        centre = log(self.mean) - self.sigma**2 / 2
        centre += self.sigma * sqrt(self.correlation) * task.gauss(0.0, 1.0)
        spread = self.sigma * sqrt(1.0 - self.correlation)
        return [self._clipped(exp(centre + spread * attempt.gauss(0.0, 1.0))) for _ in range(size)]

    def _clipped(self, length: float) -> int:
        return max(1, min(self.most, round(length)))


@attrs.frozen(kw_only=True)
class EmpiricalLengths:
    """Lengths of a past run: a group is one of its groups, its siblings are drawn from that group's."""

    groups: tuple[tuple[int, ...], ...]

    def draw(self, task: Random, attempt: Random, size: int) -> list[int]:
        return attempt.choices(task.choice(self.groups), k=size)


@attrs.frozen(kw_only=True)
class LognormalSeconds:
    """A duration; 0 with a mean of 0."""

    mean: float
    sigma: float

    def draw(self, random: Random) -> float:
        return random.lognormvariate(log(self.mean) - self.sigma**2 / 2, self.sigma) if self.mean else 0.0


@attrs.frozen(kw_only=True)
class Workload:
    """What is generated."""

    lengths: Lengths
    latency: LognormalSeconds
    failure: float = 0.0
    """Probability that a rollout is lost, at a uniformly drawn share of its tokens."""

    def group(self, seed: int, group_id: int, attempt: int, size: int) -> list[RolloutPlan]:
        """The siblings of one attempt at a group."""
        of_task = Random(mix(seed, _TASK, group_id))
        of_attempt = Random(mix(seed, _ATTEMPT, group_id, attempt))
        lengths = self.lengths.draw(of_task, of_attempt, size)
        return [self._rollout(length, of_attempt) for length in lengths]

    def _rollout(self, length: int, random: Random) -> RolloutPlan:
        latency = self.latency.draw(random)
        if random.random() >= self.failure:
            return RolloutPlan(length, latency, False)
        return RolloutPlan(max(1, int(length * random.random())), latency, True)
