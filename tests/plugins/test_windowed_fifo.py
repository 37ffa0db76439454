"""Scheduler `windowed_fifo`: the window, and what it costs in running ahead. Whole runs: tests/simulate."""

from __future__ import annotations

import pytest
from prl.providers import InFlight, Pipeline
from prl.types import Group, TaskRef
from prl_windowed_fifo import WindowedFifoConfig, prl_schedulers
from prl_windowed_fifo.scheduler import WindowedFifo, build


def scheduler(*, max_staleness: int = 1, groups_per_step: int = 4, window: int = 3) -> WindowedFifo:
    return WindowedFifo(max_staleness=max_staleness, groups_per_step=groups_per_step, window=window)


def group(started_version: int) -> Group:
    task = TaskRef(environment="e", split="train", index=0)
    return Group(group_id=7, task=task, attempt=0, started_version=started_version, rollouts=())


@pytest.mark.parametrize(
    ("ready", "outstanding", "chosen"),
    [
        ([1, 2, 3, 4], [], [1, 2]),  # nothing is unfinished: the oldest
        ([1, 2, 3, 4], [5], [1, 2]),
        ([5, 6, 7], [4], [5, 6]),  # 4, 5 and 6 are the window: both overtake 4
        ([5, 7, 8], [4], []),  # 7 and 8 lie beyond it: wait for 4
        ([5, 7, 8], [6], [5, 7]),
        ([2, 8, 9], [7], [2, 8]),
        ([5, 6], [4, 8, 9], [5, 6]),  # the oldest unfinished counts
    ],
)
def test_the_window_begins_at_the_oldest_unfinished_group(
    ready: list[int], outstanding: list[int], chosen: list[int]
) -> None:
    assert scheduler().select(ready, outstanding, 2) == chosen


def test_a_window_of_one_is_strict_order() -> None:
    strict = scheduler(window=1)
    assert strict.select([5, 6], [4], 2) == []
    assert strict.select([4, 5, 6], [7], 2) == [4, 5]


@pytest.mark.parametrize(
    ("version", "next_version", "ready", "running", "capacity"),
    [
        (3, 3, 0, 0, 6),  # two steps of four groups, less the two that may overtake
        (3, 4, 0, 0, 2),
        (3, 5, 0, 0, 0),
        (3, 3, 1, 4, 1),
        (3, 3, 4, 4, 0),
    ],
)
def test_capacity_leaves_room_for_what_may_overtake(
    version: int, next_version: int, ready: int, running: int, capacity: int
) -> None:
    pipeline = Pipeline(version=version, next_version=next_version, ready=ready, running=running)
    assert scheduler().capacity(pipeline) == capacity


def test_a_stale_group_is_refused_and_nothing_in_flight_is_cut() -> None:
    drop = scheduler().admit(group(2), 4)
    assert drop is not None
    assert (drop.group_id, drop.reason, drop.retry) == (7, "stale", True)
    assert scheduler().admit(group(3), 4) is None
    assert scheduler().on_publish(9, [InFlight(group_id=7, started_version=2, started_at=0.0)]) == []


@pytest.mark.parametrize(
    ("max_staleness", "fraction", "window"), [(1, 0.3, 5), (4, 0.3, 20), (1, 0.0, 1), (1, 1.0, 17), (0, 1.0, 1)]
)
def test_the_window_is_a_share_of_the_slack(max_staleness: int, fraction: float, window: int) -> None:
    config = WindowedFifoConfig(max_staleness=max_staleness, window_fraction=fraction)
    assert build(config, 16, lambda: 0.0) == scheduler(max_staleness=max_staleness, groups_per_step=16, window=window)


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_the_share_is_a_share(fraction: float) -> None:
    with pytest.raises(ValueError, match="window_fraction"):
        WindowedFifoConfig(window_fraction=fraction)


def test_the_plugin_provides_it() -> None:
    (provider,) = prl_schedulers()
    assert (provider.name, provider.config) == ("windowed_fifo", WindowedFifoConfig)
