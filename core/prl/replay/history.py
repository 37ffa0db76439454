"""Which launches of a run led to its weights, and which steps of each count.

A launch that continues from step S undoes what came after S. So the history of the weights is the launches, each up to
the cut that the next one continued from; what was undone is not replayed.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import attrs

from prl.errors import RunError, UserError
from prl.ledger import event_log
from prl.ledger.events import Begun, Continued
from prl.ledger.read import snapshot
from prl.run_dir import RunDir

_LAUNCHES = "SELECT launch, step FROM launches WHERE step IS NOT NULL ORDER BY launch"
_TRAINED = "SELECT max(step) FROM batches WHERE done_at IS NOT NULL AND void_by IS NULL"


@attrs.frozen(kw_only=True)
class Segment:
    """The part of a launch that counts: steps `start + 1` to `end`."""

    launch: int
    start: int
    end: int
    log: Path
    followed_by: Path | None
    """Log of the launch that continued from the cut of step `end`; None for the last."""


def segments(run_dir: RunDir, until: int | None) -> list[Segment]:
    """What is to be replayed, in order; UserError when there is nothing, or no such step."""
    ledger = snapshot(run_dir.ledger)
    live = _live(ledger)
    trained = ledger.execute(_TRAINED).fetchone()[0]
    if not live or trained is None:
        raise UserError(f"{run_dir.path} has trained no step yet: there is nothing to replay")
    first = live[0][1] + 1
    if until is not None and not first <= until <= trained:
        raise UserError(f"--until {until}: the ledger of {run_dir.path} has steps {first} to {trained}")
    goal = trained if until is None else until
    ends = [min(start, goal) for _, start in live[1:]] + [goal]
    logs = [event_log.path_of(run_dir, launch) for launch, _ in live]
    following = [*logs[1:], None]
    found = [
        Segment(launch=launch, start=start, end=end, log=log, followed_by=after if end < goal else None)
        for (launch, start), end, log, after in zip(live, ends, logs, following, strict=True)
        if start < goal
    ]
    for segment in found:
        _require_log(segment, run_dir)
    return found


def _live(ledger: sqlite3.Connection) -> list[tuple[int, int]]:
    """(launch, the step it continues from) of every launch that was not undone whole."""
    live: list[tuple[int, int]] = []
    for launch, step in ledger.execute(_LAUNCHES):
        while live and live[-1][1] >= step:
            live.pop()
        live.append((launch, step))
    return live


def _require_log(segment: Segment, run_dir: RunDir) -> None:
    if not segment.log.is_file():
        raise UserError(
            f"{run_dir.path} has no event log of launch {segment.launch}, which trained steps {segment.start + 1} to "
            f'{segment.end}: it ran with run.event_log = "off", or before prl kept one'
        )


def head(log: Path) -> tuple[Begun, Continued]:
    """How a launch began; RunError when its log does not go that far."""
    found: list[Any] = [event for _, (_, event) in zip(range(2), event_log.read(log), strict=False)]
    if len(found) != 2 or not (isinstance(found[0], Begun) and isinstance(found[1], Continued)):
        raise RunError(f"{log} is cut short before its first step: there is nothing to replay")
    return found[0], found[1]
