"""Checks of what was trained: batches are whole, and no token in them is older than the scheduler's bound allows."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator

from prl.ledger.read import run_lengths
from prl.ledger.report import Check, plural, spans

_SIZES = """
    WITH content AS (
        SELECT m.batch, i.group_id, count(r.member) AS rollouts, sum(r.length) AS length, sum(r.tokens) AS tokens
        FROM members m JOIN issues i ON i.id = m.issue LEFT JOIN rollouts r ON r.issue = i.id GROUP BY m.batch, i.id
    )
    SELECT b.step, b.phase, b.tokens, b.sampled, l.groups_per_step, l.samples_per_step,
           count(c.group_id) AS members, count(DISTINCT c.group_id) AS groups, total(c.rollouts = 0) AS empty,
           total(c.length) AS rollout_length, total(c.tokens) AS rollout_tokens
    FROM batches b JOIN launches l USING (launch) LEFT JOIN content c ON c.batch = b.id
    GROUP BY b.id ORDER BY b.id
"""
_AGES = """
    SELECT b.id, b.step, b.version, b.staleness_min, b.staleness_max, l.max_staleness, i.group_id,
           r.member, r.oldest, r.newest, r.length, r.versions
    FROM batches b JOIN launches l USING (launch) JOIN members m ON m.batch = b.id JOIN issues i ON i.id = m.issue
         JOIN rollouts r ON r.issue = i.id
    WHERE b.done_at IS NOT NULL AND b.phase = 'rl' AND r.oldest IS NOT NULL ORDER BY b.id
"""


# --- batches are whole ------------------------------------------------------------------------------------------------
def whole(ledger: sqlite3.Connection) -> Check:
    """Every batch has its groups, and its columns as many tokens as its rollouts."""
    rows = ledger.execute(_SIZES).fetchall()
    open_steps = ledger.execute("SELECT step FROM batches WHERE done_at IS NULL AND void_by IS NULL").fetchall()
    unfinished = f"; step {spans(step for (step,) in open_steps)} is not done" if open_steps else ""
    phases = Counter(row["phase"] for row in rows)
    counts = ", ".join(plural(count, f"{phase} batch") for phase, count in sorted(phases.items()))
    return Check(
        name="batches",
        claim="every batch has its full number of groups, and the tokens of its rollouts",
        numbers=(counts or "no batch was formed") + unfinished,
        problems=(*_repeated(ledger), *(problem for row in rows for problem in _wrong_size(row))),
    )


def _repeated(ledger: sqlite3.Connection) -> Iterator[str]:
    rows = ledger.execute("SELECT step, count(*) FROM batches WHERE void_by IS NULL GROUP BY step HAVING count(*) > 1")
    for step, count in rows:
        yield f"step {step} has {count} batches"


def _wrong_size(row: sqlite3.Row) -> Iterator[str]:
    expected = row["groups_per_step"] if row["phase"] == "rl" else row["samples_per_step"]
    if not row["members"] == row["groups"] == expected:
        yield f"the batch of step {row['step']} has {row['groups']} groups, expected {expected}"
    if row["phase"] != "rl":
        return
    if row["empty"]:
        yield f"the batch of step {row['step']} has {plural(int(row['empty']), 'group')} without a rollout"
    if (row["sampled"], row["tokens"]) != (row["rollout_length"], row["rollout_tokens"]):
        yield (
            f"the batch of step {row['step']} has {row['sampled']} sampled tokens of {row['tokens']}, "
            f"its rollouts {row['rollout_length']:.0f} of {row['rollout_tokens']:.0f}"
        )


# --- staleness --------------------------------------------------------------------------------------------------------
def fresh(ledger: sqlite3.Connection) -> Check:
    """No trained token above the bound, in steps that were undone neither."""
    tokens: Counter[int] = Counter()
    problems: list[str] = []
    bounds: set[int | None] = set()
    measured: dict[int, tuple[sqlite3.Row, set[int]]] = {}
    for row in ledger.execute(_AGES):
        ages = _ages(row)
        tokens.update(ages)
        bounds.add(row["max_staleness"])
        measured.setdefault(row["id"], (row, set()))[1].update(ages)
        problems += _too_old(row, ages)
    problems += [problem for row, ages in measured.values() for problem in _disagreement(row, ages)]
    declared = ", ".join(str(bound) for bound in sorted(b for b in bounds if b is not None)) or "none declared"
    shares = ", ".join(f"{count / tokens.total():.1%} at {age}" for age, count in sorted(tokens.items()))
    return Check(
        name="staleness",
        claim="no token was trained later than the scheduler's bound allows",
        numbers=f"bound {declared}; {plural(tokens.total(), 'sampled token')}: {shares}" if tokens else "none trained",
        problems=tuple(problems),
    )


def _ages(row: sqlite3.Row) -> Counter[int]:
    """Staleness -> tokens of one rollout."""
    ages: Counter[int] = Counter()
    for version, tokens in run_lengths(row["versions"]):
        ages[row["version"] - version] += tokens
    return ages


def _too_old(row: sqlite3.Row, ages: Counter[int]) -> Iterator[str]:
    which = f"rollout {row['group_id']}.{row['member']}, trained in step {row['step']},"
    bound = row["max_staleness"]
    if bound is not None and max(ages) > bound:
        count = sum(n for age, n in ages.items() if age > bound)
        yield f"{which} has {plural(count, 'token')} above the bound {bound}, the oldest at staleness {max(ages)}"
    if min(ages) < 0:
        yield f"{which} was sampled by version {row['newest']}, newer than the version {row['version']} being trained"
    extremes = (row["version"] - max(ages), row["version"] - min(ages), ages.total())
    if extremes != (row["oldest"], row["newest"], row["length"]):
        yield f"{which} has versions {row['versions']!r} that do not add up to what is said of it"


def _disagreement(row: sqlite3.Row, ages: set[int]) -> Iterator[str]:
    if (min(ages), max(ages)) != (row["staleness_min"], row["staleness_max"]):
        yield (
            f"the columns of the batch of step {row['step']} have staleness {row['staleness_min']} to "
            f"{row['staleness_max']}, its rollouts {min(ages)} to {max(ages)}"
        )
