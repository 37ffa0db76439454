"""`prl audit`: what can be proven about a run from its files alone, and what cannot.

Everything is read from a snapshot of the ledger and from the checkpoints beside it; no process of the run is asked. The
checks are in `prompts`, `batches`, `weights` and `cuts`; a check that fails says what contradicts it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

from prl.ledger import batches, bias, cuts, prompts, weights
from prl.ledger.read import snapshot
from prl.ledger.report import Audit, Check, plural, spans
from prl.run_dir import RunDir

_DANGLING = 'SELECT "table", rowid, parent FROM pragma_foreign_key_check'

_UNPUBLISHED = "SELECT version FROM versions WHERE manifest = '' AND void_by IS NULL ORDER BY version"


def audit(run_dir: RunDir) -> Audit:
    """Check everything; RunError when the run has no ledger that can be read."""
    ledger = snapshot(run_dir.ledger)
    return Audit(
        run=str(run_dir.path),
        launches=tuple(_launches(ledger)),
        checks=tuple(_checks(ledger, run_dir)),
        bias=bias.shares(ledger),
        unproven=tuple(_unproven(ledger)),
    )


def _checks(ledger: sqlite3.Connection, run_dir: RunDir) -> Iterator[Check]:
    yield _intact(ledger)
    for feed in _feeds(ledger):
        yield prompts.once(ledger, feed)
        yield prompts.order(ledger, feed)
    yield batches.whole(ledger)
    yield batches.fresh(ledger)
    yield weights.gapless(ledger)
    yield weights.chained(ledger)
    yield weights.continued(ledger)
    yield cuts.consistent(ledger, run_dir.checkpoints)


def _feeds(ledger: sqlite3.Connection) -> list[str]:
    """The rl feed, and the warm-up's if it issued anything."""
    used = {feed for (feed,) in ledger.execute("SELECT DISTINCT feed FROM issues")}
    return [feed for feed in prompts.FEEDS if feed == "rl" or feed in used]


def _intact(ledger: sqlite3.Connection) -> Check:
    found = [row[0] for row in ledger.execute("PRAGMA integrity_check")]
    dangling = [f"table {row[0]} refers to a row of {row[2]} that is not there" for row in ledger.execute(_DANGLING)]
    pages, size = (ledger.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
    return Check(
        name="ledger",
        claim="the file is intact and refers to nothing that is missing",
        numbers=f"{pages * size / 1e6:.1f} MB",
        problems=(*(problem for problem in found if problem != "ok"), *dangling),
    )


# --- what happened ----------------------------------------------------------------------------------------------------
def _launches(ledger: sqlite3.Connection) -> Iterator[str]:
    rows = ledger.execute("SELECT * FROM launches ORDER BY launch").fetchall()
    for row in rows:
        last = row is rows[-1]
        done = ledger.execute(
            "SELECT step FROM batches WHERE launch = ? AND done_at IS NOT NULL ORDER BY step", (row["launch"],)
        ).fetchall()
        steps = f", did {plural(len(done), 'step')} ({spans(step for (step,) in done)})" if done else ""
        begun = "ended before every worker was there" if row["step"] is None else f"from step {row['step']}{steps}"
        yield f"launch {row['launch']}: {begun}; {_ended(row, last=last)}"


def _ended(row: sqlite3.Row, *, last: bool) -> str:
    if row["ended_at"] is None:
        return "has not ended, or was killed" if last else "was killed"
    return f"{row['status']}: {row['error']}" if row["error"] else str(row["status"])


# --- limits -----------------------------------------------------------------------------------------------------------
def _unproven(ledger: sqlite3.Connection) -> Iterator[str]:
    """What the files cannot tell, and why; with numbers where there are any."""
    count, cut, arrived = bias.cut_in_flight(ledger)
    if count:
        times = f": they had run for {cut:.1f} s on average, arrivals took {arrived:.1f} s" if cut and arrived else ""
        yield f"the lengths and rewards of {plural(count, 'attempt')} cut or lost in flight{times}"
    hidden = [version for (version,) in ledger.execute(_UNPUBLISHED)]
    if hidden:
        yield f"weights that were not published (version {spans(hidden)}): only their batches are in the chain"
    root = ledger.execute("SELECT step FROM launches WHERE step IS NOT NULL ORDER BY launch").fetchone()
    if root is not None and root[0]:
        yield f"what was trained before step {root[0]}: this run continues another run's checkpoint"
    unbounded = ledger.execute("SELECT count(*) FROM launches WHERE step IS NOT NULL AND max_staleness IS NULL")
    if unbounded.fetchone()[0]:
        yield "a bound of staleness: the scheduler's config declares none"
    yield "that trainer ranks trained what they were handed: only the weights they published are hashed (prl replay)"
    yield "the contents of batches: their hashes are kept, not their columns (prl replay forms them again)"
