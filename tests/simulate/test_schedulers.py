"""Properties of both schedulers over random lengths, latencies, failures, publications and restarts."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from prl.compose.config import RolloutSection
from prl.dispatch.feed import Issue
from prl.errors import RunError
from prl.providers import Drop, InFlight, Pipeline, RolloutScheduler
from prl.simulate.cluster import Cluster
from prl.simulate.groups import SimulatedGroup
from prl.simulate.loop import Clock, Simulation
from prl.simulate.tally import Tally
from prl.simulate.workload import LognormalLengths, LognormalSeconds, RolloutPlan, Workload
from prl.types import Group
from prl_bounded_staleness import BoundedStalenessConfig
from prl_bounded_staleness import scheduler as bounded_staleness
from prl_windowed_fifo import WindowedFifoConfig
from prl_windowed_fifo import scheduler as windowed_fifo

Build = Callable[[Clock], RolloutScheduler]
NO_TIMEOUT = 1e6


@attrs.frozen(kw_only=True)
class Case:
    """A small run with everything random."""

    max_staleness: int
    window_fraction: float
    rollouts: RolloutSection
    workload: Workload
    cluster: Cluster
    steps: int
    seed: int

    def bounded(self, clock: Clock) -> RolloutScheduler:
        config = BoundedStalenessConfig(max_staleness=self.max_staleness)
        return bounded_staleness.build(config, self.rollouts.groups_per_step, clock)

    def windowed(self, clock: Clock) -> windowed_fifo.WindowedFifo:
        config = WindowedFifoConfig(max_staleness=self.max_staleness, window_fraction=self.window_fraction)
        return windowed_fifo.build(config, self.rollouts.groups_per_step, clock)

    def simulation(self, build: Build, journal: Journal, *, state: Mapping[str, Any] | None = None) -> Simulation:
        return Simulation(
            build,
            rollouts=self.rollouts,
            workload=self.workload,
            cluster=self.cluster,
            steps=self.steps - (state["version"] if state else 0),
            seed=self.seed,
            tally=journal,
            state=state,
        )

    def journal(self, build: Build) -> Journal:
        """What a whole run decides. A cluster so slow that groups run into their timeout proves nothing."""
        journal = Journal()
        try:
            self.simulation(build, journal).run()
        except RunError as error:
            if "groups were dropped" not in str(error) or self.rollouts.timeout == NO_TIMEOUT:
                raise
            reject()
        return journal


@attrs.define(eq=False)
class Journal(Tally):
    """Every decision of a run."""

    entries: list[tuple[Any, ...]] = attrs.field(factory=list)
    staleness_of: dict[int, int] = attrs.field(factory=dict)
    """Trained group -> staleness of its oldest token."""

    def start(self, issue: Issue, plans: Sequence[RolloutPlan]) -> None:
        self.entries.append(("start", issue.group_id, issue.attempt))
        super().start(issue, plans)

    def drop(self, drop: Drop, issue: Issue, *, given_up: bool) -> None:
        self.entries.append(("give up" if given_up else "drop", issue.group_id, issue.attempt, drop.reason))
        super().drop(drop, issue, given_up=given_up)

    def train(self, groups: Sequence[SimulatedGroup], *, version: int, seconds: float) -> None:
        for group in groups:
            self.entries.append(("train", group.group_id, group.attempt))
            self.staleness_of[group.group_id] = version - group.oldest_version
        super().train(groups, version=version, seconds=seconds)

    def of(self, kind: str) -> list[int]:
        """Groups to which something happened, in that order."""
        return [entry[1] for entry in self.entries if entry[0] == kind]

    def lives(self) -> dict[int, list[tuple[str, int]]]:
        """Group -> (what happened, in which attempt)."""
        lives: dict[int, list[tuple[str, int]]] = defaultdict(list)
        for kind, group_id, attempt, *_ in self.entries:
            lives[group_id].append((kind, attempt))
        return lives


@st.composite
def cases(draw: st.DrawFn, *, most_staleness: int = 3) -> Case:
    """Trainer, publication and environment take from nothing to about as long as generation does."""

    def number(low: float, high: float) -> float:
        return low + (high - low) * draw(st.integers(0, 20)) / 20

    return Case(
        max_staleness=draw(st.integers(0, most_staleness)),
        window_fraction=number(0.0, 1.0),
        rollouts=RolloutSection(
            groups_per_step=draw(st.sampled_from([1, 2, 4, 7])),
            group_size=draw(st.integers(1, 3)),
            retries=draw(st.integers(0, 3)),
            timeout=draw(st.sampled_from([NO_TIMEOUT, 500.0])),
        ),
        workload=Workload(
            lengths=LognormalLengths(mean=50.0, sigma=number(0.0, 2.0), correlation=number(0.0, 1.0), most=1000),
            latency=LognormalSeconds(mean=number(0.0, 50.0), sigma=number(0.0, 1.5)),
            failure=draw(st.sampled_from([0.0, 0.1, 0.4])),
        ),
        cluster=Cluster(
            engines=draw(st.integers(1, 3)),
            slots=draw(st.sampled_from([2, 8, 32])),
            decode_base=0.5,
            decode_per_sequence=number(0.0, 0.2),
            step_base=number(0.0, 50.0),
            step_per_token=number(0.0, 0.1),
            publish=number(0.0, 50.0),
        ),
        steps=draw(st.sampled_from([2, 8, 16, 24])),
        seed=draw(st.integers(0, 1000)),
    )


def builders(case: Case) -> tuple[Build, Build]:
    return case.bounded, case.windowed


thorough = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@thorough
@given(cases())
def test_no_token_is_trained_above_the_bound(case: Case) -> None:
    for build in builders(case):
        journal = case.journal(build)
        assert max(journal.staleness_of.values()) <= case.max_staleness
        assert max(journal.staleness) <= case.max_staleness


@thorough
@given(cases())
def test_every_task_is_trained_once_or_given_up_for_a_reason_after_all_its_attempts(case: Case) -> None:
    """Nothing is lost and nothing starves: when the last step is done, no task is left on its way."""
    for build in builders(case):
        journal = case.journal(build)
        trained = journal.of("train")
        assert len(trained) == case.steps * case.rollouts.groups_per_step
        assert sorted(trained + journal.of("give up")) == sorted(set(journal.of("start")))
        for life in journal.lives().values():
            _check_life(life, case.rollouts.retries)


def _check_life(life: list[tuple[str, int]], retries: int) -> None:
    """start, drop, start, drop, ..., start, and at last train or give up."""
    last = len(life) // 2 - 1
    expected = [(kind, attempt) for attempt in range(last) for kind in ("start", "drop")]
    assert life[:-1] == [*expected, ("start", last)]
    assert life[-1] in (("train", last), ("give up", retries))
    assert last <= retries


@thorough
@given(cases())
def test_equal_seeds_give_equal_decisions(case: Case) -> None:
    for build in builders(case):
        assert case.journal(build).entries == case.journal(build).entries


@thorough
@given(cases(most_staleness=0))
def test_without_staleness_there_is_nothing_to_schedule(case: Case) -> None:
    assert case.journal(case.bounded).entries == case.journal(case.windowed).entries


# --- the window -------------------------------------------------------------------------------------------------------
@attrs.define
class Observed:
    """A scheduler whose selections are noted."""

    scheduler: windowed_fifo.WindowedFifo
    selections: list[tuple[Sequence[int], Sequence[int], Sequence[int]]] = attrs.field(factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)

    def select(self, ready: Sequence[int], outstanding: Sequence[int], count: int) -> Sequence[int]:
        chosen = self.scheduler.select(ready, outstanding, count)
        self.selections.append((ready, outstanding, chosen))
        return chosen


@thorough
@given(cases())
def test_a_straggler_is_overtaken_within_the_window_and_never_cut(case: Case) -> None:
    observed: list[Observed] = []

    def build(clock: Clock) -> Any:
        observed.append(Observed(case.windowed(clock)))
        return observed[0]

    journal = case.journal(build)
    window = observed[0].scheduler.window
    for ready, outstanding, chosen in observed[0].selections:
        end = min(outstanding, default=max(ready) + 1) + window
        assert all(group_id < end for group_id in chosen)
        assert list(chosen) == sorted(ready)[: len(chosen)]
    assert "stale" not in journal.dropped


@thorough
@given(cases())
def test_a_window_of_one_trains_in_issue_order(case: Case) -> None:
    journal = case.journal(attrs.evolve(case, window_fraction=0.0).windowed)
    assert journal.of("train") == sorted(journal.of("train"))


def test_the_window_trains_on_long_groups_that_greedy_batches_cut() -> None:
    """One fixed run, long enough for a bias to show."""
    case = Case(
        max_staleness=1,
        window_fraction=0.3,
        rollouts=RolloutSection(groups_per_step=8, group_size=4, retries=1),
        workload=Workload(
            lengths=LognormalLengths(mean=100.0, sigma=0.8, correlation=0.8, most=1000),
            latency=LognormalSeconds(mean=0.0, sigma=0.0),
        ),
        cluster=Cluster(
            engines=1,
            slots=64,
            decode_base=0.02,
            decode_per_sequence=0.001,
            step_base=0.5,
            step_per_token=0.0,
            publish=0.1,
        ),
        steps=60,
        seed=0,
    )
    greedy, windowed = (case.simulation(build, Journal()) for build in builders(case))
    greedy.run()
    windowed.run()
    assert greedy.figures().dropped["stale"] > 50
    assert greedy.figures().length_bias < -0.05
    assert windowed.figures().dropped == {}
    assert windowed.figures().length_bias == 0.0


# --- state ------------------------------------------------------------------------------------------------------------
@attrs.define
class Reborn:
    """A scheduler that is saved, built anew and loaded before every call."""

    build: Callable[[], RolloutScheduler]
    scheduler: RolloutScheduler

    def _again(self) -> Any:
        state = json.loads(json.dumps(self.scheduler.state_dict()))
        self.scheduler = self.build()
        self.scheduler.load_state_dict(state)
        return self.scheduler

    def capacity(self, pipeline: Pipeline) -> int:
        return int(self._again().capacity(pipeline))

    def admit(self, group: Group, version: int) -> Drop | None:
        drop: Drop | None = self._again().admit(group, version)
        return drop

    def on_publish(self, version: int, in_flight: Sequence[InFlight]) -> Sequence[Drop]:
        drops: Sequence[Drop] = self._again().on_publish(version, in_flight)
        return drops

    def select(self, ready: Sequence[int], outstanding: Sequence[int], count: int) -> Sequence[int]:
        chosen: Sequence[int] = self._again().select(ready, outstanding, count)
        return chosen

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scheduler.load_state_dict(state)


@thorough
@given(cases())
def test_a_scheduler_decides_the_same_after_its_state_went_to_disk_and_back(case: Case) -> None:
    for build in builders(case):
        reborn = case.journal(lambda clock, build=build: Reborn(lambda: build(clock), build(clock)))
        assert reborn.entries == case.journal(build).entries


@pytest.mark.parametrize("name", ["bounded", "windowed"])
@thorough
@given(case=cases(), data=st.data())
def test_a_killed_run_goes_on_from_its_checkpoint(name: str, case: Case, data: st.DataObject) -> None:
    """Killed again and again, at any moment after a checkpoint: each task still counts once, within the bound."""
    build = getattr(case, name)
    state: dict[str, Any] | None = None
    trained: list[int] = []
    given_up: list[int] = []
    version = 0
    while version < case.steps:
        journal = Journal()
        simulation = case.simulation(build, journal, state=state)
        version = data.draw(st.integers(version + 1, case.steps), label="checkpoint")
        simulation.run(until=version)
        state = simulation.state_dict()
        trained += journal.of("train")
        given_up += journal.of("give up")
        assert max(journal.staleness_of.values()) <= case.max_staleness
        assert name == "bounded" or "stale" not in journal.dropped
        simulation.run(until=data.draw(st.integers(version, case.steps), label="killed"))
        state = json.loads(json.dumps(state))
    assert len(trained) == len(set(trained)) == case.steps * case.rollouts.groups_per_step
    assert not set(trained) & set(given_up)
    assert sorted(trained + given_up) == list(range(len(trained) + len(given_up)))
