"""Check of the checkpoints that are on disk: each is a consistent cut, so a run can be resumed from it without loss.

A checkpoint lists what was outstanding when it was taken. Together with the ledger that must be everything: a group
that was issued before and is not listed has been trained by then, or given up; one that is listed has not been.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prl.ledger.prompts import FEEDS, launches
from prl.ledger.report import Check, plural, spans

_TRAINED = """
    SELECT i.group_id, b.step FROM batches b JOIN members m ON m.batch = b.id JOIN issues i ON i.id = m.issue
    WHERE b.done_at IS NOT NULL AND b.void_by IS NULL AND i.feed = ?
"""
_GIVEN_UP = "SELECT group_id FROM issues WHERE feed = ? AND again = 0 AND void_by IS NULL"


def consistent(ledger: sqlite3.Connection, folder: Path) -> Check:
    """Every checkpoint in `folder` that belongs to the history of the newest weights."""
    problems: list[str] = []
    checked, undone = [], []
    for path in sorted(folder.glob("step-*/controller.json")):
        state, problem = _read(path)
        if state is None:
            problems.append(problem)
        elif not _is_live(ledger, state):
            undone.append(state["step"])
        else:
            checked.append(state["step"])
            problems += [problem for feed in FEEDS for problem in _holes(ledger, feed, state)]
    problems += [f"checkpoint step-{step} belongs to no version on record" for step in _foreign(ledger, folder, undone)]
    steps = f", of steps {spans(sorted(checked))}" if checked else ""
    return Check(
        name="checkpoints",
        claim="every checkpoint on disk, with the ledger, accounts for every prompt issued before it",
        numbers=f"{plural(len(checked), 'checkpoint')}{steps}" + (f"; {len(undone)} of undone steps" if undone else ""),
        problems=tuple(problems),
    )


def _read(path: Path) -> tuple[dict[str, Any] | None, str]:
    try:
        state: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        return None, f"{path} cannot be read: {error}"
    missing = {"step", "chain", "feed", "demonstrations"} - state.keys()
    return (None, f"{path} has no {', '.join(sorted(missing))}") if missing else (state, "")


def _is_live(ledger: sqlite3.Connection, state: Mapping[str, Any]) -> bool:
    query = "SELECT 1 FROM versions WHERE version = ? AND chain = ? AND void_by IS NULL"
    return ledger.execute(query, (state["step"], state["chain"])).fetchone() is not None


def _foreign(ledger: sqlite3.Connection, folder: Path, steps: list[int]) -> Iterator[int]:
    for step in steps:
        state, _ = _read(folder / f"step-{step}" / "controller.json")
        assert state is not None, "it was read before"
        if not ledger.execute("SELECT 1 FROM versions WHERE chain = ?", (state["chain"],)).fetchone():
            yield step


def _holes(ledger: sqlite3.Connection, feed: str, state: Mapping[str, Any]) -> Iterator[str]:
    own = state["feed" if feed == "rl" else "demonstrations"]
    trained = {group_id for group_id, step in ledger.execute(_TRAINED, (feed,)) if step <= state["step"]}
    given_up = {group_id for (group_id,) in ledger.execute(_GIVEN_UP, (feed,))}
    outstanding = {issue["group_id"] for issue in own["outstanding"]}
    begun = launches(ledger, feed)[0]
    before = set(range(begun.first, own["issued"])) | begun.carried
    lost = sorted(before - trained - given_up - outstanding)
    if lost:
        yield f"checkpoint step-{state['step']} would lose groups {spans(lost)}: neither trained nor outstanding"
    repeated = sorted(outstanding & trained)
    if repeated:
        yield f"checkpoint step-{state['step']} would train groups {spans(repeated)} a second time"
