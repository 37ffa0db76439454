"""What rollouts cost: the same for the same task, whatever the schedule."""

from __future__ import annotations

from random import Random
from statistics import fmean

import pytest
from prl.simulate.workload import EmpiricalLengths, LognormalLengths, LognormalSeconds, Workload


def workload(*, correlation: float = 0.5, most: int = 100_000, failure: float = 0.0) -> Workload:
    lengths = LognormalLengths(mean=500.0, sigma=0.8, correlation=correlation, most=most)
    return Workload(lengths=lengths, latency=LognormalSeconds(mean=3.0, sigma=0.5), failure=failure)


def test_a_draw_depends_on_seed_group_and_attempt_only() -> None:
    first = workload().group(1, 7, 0, 4)
    workload().group(1, 8, 0, 4)
    assert workload().group(1, 7, 0, 4) == first
    others = [workload().group(*key, 4) for key in ((2, 7, 0), (1, 8, 0), (1, 7, 1))]
    assert all(other != first for other in others)


def test_lengths_have_the_mean_that_was_asked_for() -> None:
    lengths = [plan.tokens for group in range(4000) for plan in workload().group(0, group, 0, 4)]
    assert fmean(lengths) == pytest.approx(500.0, rel=0.05)


@pytest.mark.parametrize(("correlation", "same"), [(1.0, True), (0.0, False)])
def test_what_belongs_to_the_task_is_the_same_in_every_attempt(correlation: float, same: bool) -> None:
    lengths = [plan.tokens for n in range(2) for plan in workload(correlation=correlation).group(0, 5, n, 3)]
    assert (len(set(lengths)) == 1) is same


def test_lengths_are_cut_at_the_limit() -> None:
    lengths = [plan.tokens for group in range(50) for plan in workload(most=300).group(0, group, 0, 4)]
    assert max(lengths) == 300
    assert min(lengths) >= 1


def test_recorded_groups_are_drawn_whole() -> None:
    lengths = EmpiricalLengths(groups=((1, 2, 3), (100, 200)))
    drawn = [lengths.draw(Random(seed), Random(-seed - 1), 8) for seed in range(50)]
    assert all(set(group) <= {1, 2, 3} or set(group) <= {100, 200} for group in drawn)
    assert {max(group) > 3 for group in drawn} == {True, False}


def test_a_rollout_that_fails_has_sampled_a_part() -> None:
    whole, broken = workload().group(0, 3, 0, 200), workload(failure=1.0).group(0, 3, 0, 200)
    assert not any(plan.fails for plan in whole)
    assert all(plan.fails for plan in broken)
    assert max(plan.tokens for plan in broken) <= max(plan.tokens for plan in whole)
    some = [plan.fails for group in range(500) for plan in workload(failure=0.1).group(0, group, 0, 8)]
    assert fmean(some) == pytest.approx(0.1, abs=0.02)


def test_seconds() -> None:
    assert LognormalSeconds(mean=0.0, sigma=1.0).draw(Random(0)) == 0.0
    drawn = [LognormalSeconds(mean=3.0, sigma=0.5).draw(Random(seed)) for seed in range(4000)]
    assert fmean(drawn) == pytest.approx(3.0, rel=0.05)
