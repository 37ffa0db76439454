"""Which launches led to the weights, however often a run was resumed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from prl.errors import UserError
from prl.ledger import event_log, facts
from prl.ledger.store import Store
from prl.replay.history import segments
from prl.run_dir import RunDir

from tests.ledger.histories import Script


def run_of(path: Path, launches: Sequence[tuple[int, int]]) -> RunDir:
    """A run whose launches continue from one step and train up to another."""
    run_dir = RunDir(path)
    run_dir.events.mkdir(parents=True)
    for number, (start, end) in enumerate(launches, 1):
        store, script = Store(run_dir.ledger), Script(version=start)
        script.launch(source=f"step-{start}" if start else "")
        for _ in range(start, end):
            script.step()
        store.write([(float(n), fact) for n, fact in enumerate(script.facts)])
        store.close()
        event_log.path_of(run_dir, number).touch()
    return run_dir


@pytest.mark.parametrize(
    ("launches", "live"),
    [
        ([(0, 3)], [(1, 0, 3)]),
        ([(0, 5), (4, 6)], [(1, 0, 4), (2, 4, 6)]),
        ([(0, 5), (0, 2)], [(2, 0, 2)]),
        ([(0, 5), (4, 4), (4, 6)], [(1, 0, 4), (3, 4, 6)]),
        ([(0, 5), (4, 8), (2, 3)], [(1, 0, 2), (3, 2, 3)]),
        ([(3, 5), (4, 6)], [(1, 3, 4), (2, 4, 6)]),
    ],
)
def test_each_launch_counts_up_to_where_the_next_goes_on(
    tmp_path: Path, launches: list[tuple[int, int]], live: list[tuple[int, int, int]]
) -> None:
    found = segments(run_of(tmp_path, launches), None)
    assert [(segment.launch, segment.start, segment.end) for segment in found] == live
    assert [segment.followed_by for segment in found] == [*(segment.log for segment in found[1:]), None]


@pytest.mark.parametrize(("until", "live"), [(3, [(1, 3)]), (4, [(1, 4)]), (5, [(1, 4), (2, 5)])])
def test_until_a_step(tmp_path: Path, until: int, live: list[tuple[int, int]]) -> None:
    found = segments(run_of(tmp_path, [(0, 5), (4, 6)]), until)
    assert [(segment.launch, segment.end) for segment in found] == live
    assert found[-1].followed_by is None


def test_what_cannot_be_replayed(tmp_path: Path) -> None:
    run_dir = run_of(tmp_path, [(0, 0)])
    with pytest.raises(UserError, match="has trained no step yet"):
        segments(run_dir, None)


def test_facts_that_only_the_event_log_keeps_leave_the_ledger_as_it_is(tmp_path: Path) -> None:
    store = Store(tmp_path / "ledger")
    store.write([(0.0, facts.Started()), (1.0, facts.Taken((1,))), (2.0, facts.Cut(0))])
    assert store.launch == 1
    store.close()
