"""`prl explain`: what a step was made of, from the ledger, and what came of it, from metrics.jsonl.

A step that was undone by a resume and done again is explained as it counts now. What was excluded is everything that
was dropped, and every failure, between the moment the batch before was formed and the moment this one was.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prl.errors import UserError
from prl.ledger.read import run_lengths, snapshot
from prl.ledger.report import spans
from prl.report.load import metric_rows
from prl.run_dir import RunDir

_ISSUES = """
    SELECT i.*, m.ordinal FROM members m JOIN issues i ON i.id = m.issue WHERE m.batch = ? ORDER BY m.ordinal
"""
_EXCLUDED = """
    SELECT i.group_id, i.attempt, i.environment, i.task, i.dropped AS reason, i.again, count(r.member) AS rollouts,
           avg(r.length) AS length, avg(r.reward) AS reward, i.ended_at - i.placed_at AS seconds
    FROM issues i LEFT JOIN rollouts r ON r.issue = i.id
    WHERE i.launch = :launch AND i.dropped IS NOT NULL AND i.ended_at > :after AND i.ended_at <= :until
    GROUP BY i.id ORDER BY i.ended_at
"""
_FAILURES = """
    SELECT who, place, sentence, done FROM failures WHERE launch = :launch AND at > :after AND at <= :until ORDER BY at
"""


def explain(run_dir: RunDir, step: int | None) -> dict[str, Any]:
    """Everything about a step, as JSON values; the last step that was formed by default.

    UserError when the step is not on record, RunError when there is no ledger.
    """
    ledger = snapshot(run_dir.ledger)
    batch = _batch(ledger, step)
    groups = [_group(ledger, batch, issue) for issue in ledger.execute(_ISSUES, (batch["id"],)).fetchall()]
    return {
        **{name: batch[name] for name in ("step", "phase", "version", "launch", "tokens", "sampled", "digest")},
        "state": _state(batch),
        "undone": [row["launch"] for row in _all_batches(ledger, batch["step"]) if row["id"] != batch["id"]],
        "streams": json.loads(batch["token_counts"]),
        "staleness": _staleness(groups),
        "weights": _weights(ledger, batch),
        "metrics": _metrics(run_dir.metrics, batch["step"]),
        "groups": groups,
        "excluded": _excluded(ledger, batch),
    }


def _all_batches(ledger: sqlite3.Connection, step: int) -> list[sqlite3.Row]:
    """Of a step, the one that counts first."""
    query = "SELECT * FROM batches WHERE step = ? ORDER BY void_by IS NOT NULL, id DESC"
    return ledger.execute(query, (step,)).fetchall()


def _batch(ledger: sqlite3.Connection, step: int | None) -> sqlite3.Row:
    steps = [row[0] for row in ledger.execute("SELECT DISTINCT step FROM batches ORDER BY step")]
    if not steps:
        raise UserError("no batch was formed yet, so there is no step to explain")
    rows = _all_batches(ledger, steps[-1] if step is None else step)
    if not rows:
        raise UserError(f"step {step} is not on record; the ledger has steps {spans(steps)}")
    return rows[0]


def _state(batch: sqlite3.Row) -> str:
    state = "formed"
    if batch["done_at"] is not None:
        state = "trained"
    elif batch["handed_at"] is not None:
        state = "handed to the trainer, not done"
    return f"{state}, undone by launch {batch['void_by']}" if batch["void_by"] is not None else state


# --- what it is made of -----------------------------------------------------------------------------------------------
def _group(ledger: sqlite3.Connection, batch: sqlite3.Row, issue: sqlite3.Row) -> dict[str, Any]:
    rows = ledger.execute("SELECT * FROM rollouts WHERE issue = ? ORDER BY member", (issue["id"],))
    names = ("group_id", "environment", "task", "attempt", "engine", "worker")
    arrived = issue["arrived_at"]
    return {
        **{name: issue[name] for name in names},
        "dispatched_at_version": issue["version"],
        "seconds": arrived - issue["placed_at"] if arrived and issue["placed_at"] else None,
        "waited": batch["formed_at"] - arrived if arrived else None,
        "rollouts": [_rollout(row, batch["version"]) for row in rows],
    }


def _rollout(row: sqlite3.Row, version: int) -> dict[str, Any]:
    names = ("member", "length", "tokens", "reward", "advantage", "versions")
    staleness = None if row["oldest"] is None else version - row["oldest"]
    ages = {version - number: tokens for number, tokens in run_lengths(row["versions"])}
    return {
        **{name: row[name] for name in names},
        "truncated": bool(row["truncated"]),
        "staleness": staleness,
        "ages": {str(age): tokens for age, tokens in sorted(ages.items())},
    }


def _staleness(groups: list[dict[str, Any]]) -> dict[str, int]:
    """Staleness -> sampled tokens."""
    ages: Counter[int] = Counter()
    for group in groups:
        for rollout in group["rollouts"]:
            ages.update({int(age): tokens for age, tokens in rollout["ages"].items()})
    return {str(age): tokens for age, tokens in sorted(ages.items())}


# --- what was around it -----------------------------------------------------------------------------------------------
def _weights(ledger: sqlite3.Connection, batch: sqlite3.Row) -> dict[str, Any]:
    """The version it trained, and the one it made."""
    query = "SELECT * FROM versions WHERE version = ? AND {} ORDER BY void_by IS NOT NULL, id DESC"
    made = ledger.execute(query.format("batch = ?"), (batch["step"], batch["digest"])).fetchone()
    parent = ("chain = ?", made["parent"]) if made is not None else ("launch <= ?", batch["launch"])
    trained = ledger.execute(query.format(parent[0]), (batch["version"], parent[1])).fetchone()
    return {"trained": _version(trained), "made": _version(made)}


def _version(row: sqlite3.Row | None) -> dict[str, Any] | None:
    if row is None:
        return None
    return {
        "version": row["version"],
        "chain": row["chain"],
        "published": bool(row["manifest"]),
        "served_after": row["served_seconds"],
    }


def _metrics(path: Path, step: int) -> dict[str, float]:
    """The line of the step; of several, the last: a resumed run writes its steps again."""
    found: Mapping[str, Any] = {}
    for row in metric_rows(path) if path.is_file() else ():
        if row["step"] == step and row["phase"] != "eval":
            found = row
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def _excluded(ledger: sqlite3.Connection, batch: sqlite3.Row) -> dict[str, list[dict[str, Any]]]:
    before = ledger.execute(
        "SELECT max(formed_at) FROM batches WHERE launch = ? AND id < ?", (batch["launch"], batch["id"])
    ).fetchone()[0]
    span = {"launch": batch["launch"], "after": before or 0.0, "until": batch["formed_at"]}
    return {
        "groups": [dict(row) for row in ledger.execute(_EXCLUDED, span)],
        "failures": [dict(row) for row in ledger.execute(_FAILURES, span)],
    }
