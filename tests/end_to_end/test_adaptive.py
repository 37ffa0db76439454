"""A run whose groups in flight are limited by what the engine bears: the limit is reached, respected, and replayed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prl.ledger import event_log
from prl.ledger.events import Arrived, Dropped, Event, Issued, Loads
from prl.replay.history import segments
from prl.run_dir import RunDir
from prl_adaptive.limit import Limit

from tests.end_to_end.live import TINY, Run, launched, prl
from tests.listening import needs_proc

pytestmark = needs_proc

ROOM, MOST, BOUND = 4, 6, 16
"""Groups: what the engine has room for at full length; the config's most; what staleness alone would allow."""
EDITS = (
    "run.steps=12",
    "scheduler.type=adaptive",
    f"scheduler.most={MOST}",
    "scheduler.poll_seconds=0.05",
    "scheduler.within.type=bounded_staleness",
    "scheduler.within.max_staleness=3",
    f"engine.sequences={2 * ROOM}",
    "evaluation.every=0",
    "trackers=[]",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("adaptive")
    config = folder / "tiny.toml"
    config.write_text(TINY)
    with launched(config, folder / "run", *EDITS, words=("--plugins", "adaptive")) as launch:
        code, errors = launch.end()
        assert code == 0, errors
    return Run(dir=RunDir(folder / "run"))


def flights(run: Run) -> Iterator[tuple[int, int]]:
    """(groups in flight, limit in force) after every group that was issued, from the event log alone."""
    (segment,) = segments(run.dir, None)
    limit, flying, arrived = Limit(start=0, most=MOST), set[int](), 0
    for _, event in event_log.read(segment.log):
        arrived += isinstance(event, Arrived)
        _fly(flying, event)
        if isinstance(event, Loads):
            limit.observe(event.at, event.loads, running=len(flying), arrived=arrived, group_size=2)
        elif isinstance(event, Issued):
            yield len(flying), limit.value


def _fly(flying: set[int], event: Event) -> None:
    match event:
        case Issued(issue):
            flying.add(issue.group_id)
        case Arrived(group=group):
            flying.discard(group.group_id)
        case Dropped(group_id=group_id):
            flying.discard(group_id)


def test_the_limit_is_reached_and_respected(run: Run) -> None:
    seen = list(flights(run))
    assert len(seen) >= 12 * 4
    assert all(flying <= limit for flying, limit in seen)
    assert any(flying == limit for flying, limit in seen)
    assert ROOM <= max(limit for _, limit in seen) <= MOST < BOUND


def test_the_limit_is_a_metric(run: Run) -> None:
    limits = [line["scheduler/limit"] for line in run.rl_steps]
    assert len(limits) == 12
    assert {ROOM <= limit <= MOST for limit in limits} == {True}
    assert max(line["staleness/max"] for line in run.rl_steps) <= 3


def test_the_run_is_done_again_with_the_same_decisions(run: Run) -> None:
    done = prl("replay", str(run.dir.path))
    assert done.returncode == 0, done.stdout + done.stderr
