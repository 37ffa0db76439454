"""Hooks and trackers are told, and cannot stop anything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from prl.dispatch.events import LifecycleHooks, Trackers
from prl.errors import RunError, UserError

from tests.dispatch.fakes import FakeTracker


def hooks(**functions: Callable[..., None]) -> LifecycleHooks:
    return LifecycleHooks(lambda hook: list(functions.items()))


def test_hooks_are_called_in_order_with_their_arguments():
    calls: list[Any] = []
    chain = hooks(first=lambda **kw: calls.append((1, kw)), second=lambda **kw: calls.append((2, kw)))
    chain.call("prl_weights_published", version=3, seconds=0.5)
    arguments = {"version": 3, "seconds": 0.5}
    assert calls == [(1, arguments), (2, arguments)]


def test_a_hook_that_fails_harms_no_other_and_is_switched_off_after_three_failures():
    calls: list[str] = []

    def broken(**arguments: Any) -> None:
        calls.append("broken")
        raise ValueError("no")

    chain = hooks(broken=broken, healthy=lambda **kw: calls.append("healthy"))
    for _ in range(5):
        chain.call("prl_step_end", step=1)
    assert calls.count("broken") == 3
    assert calls.count("healthy") == 5


def test_only_failures_in_a_row_count_and_only_for_their_hook():
    outcomes = iter([True, True, False] * 4)
    calls: list[str] = []

    def moody(**arguments: Any) -> None:
        calls.append("called")
        if next(outcomes):
            raise ValueError("no")

    chain = hooks(moody=moody)
    for _ in range(12):
        chain.call("prl_step_end", step=1)
    assert len(calls) == 12


def run_trackers(trackers: list[FakeTracker], lines: int) -> None:
    async def body() -> None:
        told = Trackers([("fake", tracker) for tracker in trackers])
        await told.start()
        for step in range(lines):
            told.log(step, {"x": step})
        told.close()
        await told.run()
        await told.finish(None)

    asyncio.run(body())


def test_trackers_are_told_everything_in_order():
    tracker = FakeTracker()
    run_trackers([tracker], 5)
    assert [line["x"] for line in tracker.lines] == [0, 1, 2, 3, 4]
    assert tracker.started
    assert tracker.finished == [None]


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on():
    class Counting(FakeTracker):
        asked = 0

        def log(self, step, metrics):
            Counting.asked += 1
            super().log(step, metrics)

    broken, healthy = Counting(broken={"log"}), FakeTracker()
    run_trackers([broken, healthy], 6)
    assert Counting.asked == 3
    assert len(healthy.lines) == 6
    assert broken.finished == [None]


def test_what_does_not_fit_into_the_queue_is_left_out_and_counted():
    async def body() -> int:
        trackers = Trackers([("fake", FakeTracker())])
        for step in range(300):
            trackers.log(step, {})
        return trackers.statistics().refused

    assert asyncio.run(body()) == 300 - 256


@pytest.mark.parametrize(
    ("error", "expected", "sentence"),
    [
        (ValueError("no login"), RunError, "tracker fake cannot start: no login"),
        (UserError("set trackers.project"), UserError, "set trackers.project"),
    ],
)
def test_a_tracker_that_cannot_start_is_an_error(error, expected, sentence):
    class Broken(FakeTracker):
        def start(self):
            raise error

    with pytest.raises(expected, match=sentence):
        run_trackers([Broken()], 0)
