"""What is counted while a simulation runs. Told by the loop, knows nothing of its rules."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import attrs

from prl.dispatch.feed import Issue
from prl.providers import Drop
from prl.simulate.engine import SimulatedEngine
from prl.simulate.figures import Figures
from prl.simulate.groups import SimulatedGroup
from prl.simulate.workload import RolloutPlan


@attrs.define
class Mean:
    """A running mean; None of nothing."""

    total: float = 0.0
    count: int = 0

    def add(self, total: float, count: int) -> None:
        self.total += total
        self.count += count

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@attrs.define(eq=False)
class Tally:
    """Subclass it to see the decisions one by one."""

    steps: int = 0
    groups_trained: int = 0
    given_up: int = 0
    dropped: Counter[str] = attrs.field(factory=Counter)
    staleness: Counter[int] = attrs.field(factory=Counter)
    """Trained tokens by staleness."""
    tokens_wasted: int = 0
    trainer_seconds: float = 0.0
    queues: dict[str, float] = attrs.field(factory=lambda: defaultdict(float))
    """Name -> entries, integrated over time."""
    length_issued: Mean = attrs.field(factory=Mean)
    length_trained: Mean = attrs.field(factory=Mean)
    length_dropped: Mean = attrs.field(factory=Mean)
    _planned: dict[int, tuple[int, int]] = attrs.field(factory=dict)
    """Group on its way -> tokens and number of its rollouts that will not fail."""
    _now: float = 0.0
    _queued: dict[str, int] = attrs.field(factory=dict)

    # --- told by the loop ---------------------------------------------------------------------------------------------
    def start(self, issue: Issue, plans: Sequence[RolloutPlan]) -> None:
        lengths = [plan.tokens for plan in plans if not plan.fails]
        self._planned[issue.group_id] = sum(lengths), len(lengths)
        if issue.attempt == 0:
            self.length_issued.add(sum(lengths), len(lengths))

    def drop(self, drop: Drop, issue: Issue, *, given_up: bool) -> None:
        """An attempt came to nothing; `given_up` when there will not be another."""
        self.dropped[drop.reason] += 1
        self.given_up += given_up
        self.length_dropped.add(*self._planned.pop(issue.group_id))

    def waste(self, tokens: int) -> None:
        """Tokens were sampled that nothing will be trained on."""
        self.tokens_wasted += tokens

    def train(self, groups: Sequence[SimulatedGroup], *, version: int, seconds: float) -> None:
        """A step over these groups was made at `version` and took so long."""
        self.steps += 1
        self.trainer_seconds += seconds
        self.groups_trained += len(groups)
        for group in groups:
            del self._planned[group.group_id]
            self.length_trained.add(group.sampled_count, len(group.rollouts))
            for rollout in group.rollouts:
                for sampled_at, tokens in rollout.runs:
                    self.staleness[version - sampled_at] += tokens

    def queue(self, now: float, **lengths: int) -> None:
        """Lengths of the queues from `now` on."""
        for name, length in self._queued.items():
            self.queues[name] += length * (now - self._now)
        self._now, self._queued = now, lengths

    # ------------------------------------------------------------------------------------------------------------------
    def figures(self, now: float, engines: Sequence[SimulatedEngine]) -> Figures:
        """What came of it until `now`; at least one step has been made."""
        trained = self.staleness.total()
        engine_seconds = now * len(engines)
        self.queues["slots"] = sum(engine.queue_seconds for engine in engines)
        return Figures(
            steps=self.steps,
            seconds=now,
            tokens_per_second=trained / now,
            idle_trainer=1.0 - self.trainer_seconds / now,
            idle_engine=1.0 - sum(engine.busy_seconds for engine in engines) / engine_seconds,
            sequences=sum(engine.slot_seconds for engine in engines) / engine_seconds,
            staleness={age: self.staleness[age] / trained for age in sorted(self.staleness)},
            staleness_mean=sum(age * tokens for age, tokens in self.staleness.items()) / trained,
            dropped=dict(self.dropped.most_common()),
            given_up=self.given_up,
            groups_trained=self.groups_trained,
            tokens_wasted=self.tokens_wasted / (trained + self.tokens_wasted),
            length_issued=self.length_issued.value or 0.0,
            length_trained=self.length_trained.value or 0.0,
            length_dropped=self.length_dropped.value,
            queues={name: total / now for name, total in sorted(self.queues.items())},
        )
