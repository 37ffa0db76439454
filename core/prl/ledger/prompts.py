"""Each prompt exactly once: what became of every group that a feed issued, and of every task of its order.

A group is a prompt's way through the run; its id and its position in the environment's order are the feed's. Proven
here, from issues, batches and what launches carried over: every id from the first to the newest has one end, which is
trained (in one live step), given up with a reason, or still outstanding in the last launch; and every position of an
environment's order was issued once. A launch that a kill ended leaves groups behind; they are lost unless the next
launch carried them over or began before they were issued.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter

import attrs

from prl.ledger.report import Check, plural, spans

FEEDS = {"rl": "rl", "warmup": "warm-up"}

_ATTEMPTS = """
    SELECT i.group_id, i.id, i.launch, i.void_by, i.placed_at, i.arrived_at, i.admitted, i.dropped, i.again,
           b.step, b.done_at IS NOT NULL AND b.void_by IS NULL AS trained, b.void_by IS NULL AS in_batch
    FROM issues i LEFT JOIN members m ON m.issue = i.id LEFT JOIN batches b ON b.id = m.batch
    WHERE i.feed = ? ORDER BY i.group_id, i.id
"""
_POSITIONS = """
    SELECT environment, position, task, group_id FROM issues WHERE feed = :feed AND void_by IS NULL
    UNION SELECT environment, position, task, group_id FROM carried WHERE feed = :feed AND launch = :launch
    ORDER BY environment, position
"""


@attrs.frozen(kw_only=True)
class Launch:
    """A launch that got as far as continuing from a step, and where its feed stood then."""

    number: int
    first: int
    """Id of the first group that this launch issued afresh."""
    carried: frozenset[int]
    reached: int
    """Id of the newest group that it issued; -1 before the first."""

    def awaits(self, group_id: int) -> bool:
        """Whether a group without an attempt will be issued yet."""
        return group_id in self.carried or group_id >= max(self.first, self.reached + 1)


@attrs.frozen(kw_only=True)
class Life:
    """What became of a group."""

    group_id: int
    end: str
    """`trained`, `given up: <reason>`, an outstanding state, or `lost`."""
    problem: str = ""


def launches(ledger: sqlite3.Connection, feed: str) -> list[Launch]:
    """In order; those that ended before everyone had said Hello are left out."""
    carried: dict[int, set[int]] = {}
    for launch, group_id in ledger.execute("SELECT launch, group_id FROM carried WHERE feed = ?", (feed,)):
        carried.setdefault(launch, set()).add(group_id)
    reached = dict(
        map(tuple, ledger.execute("SELECT launch, max(group_id) FROM issues WHERE feed = ? GROUP BY launch", (feed,)))
    )
    first = ledger.execute("SELECT DISTINCT launch, issued FROM feeds WHERE feed = ? ORDER BY launch", (feed,))
    return [
        Launch(number=n, first=issued, carried=frozenset(carried.get(n, ())), reached=reached.get(n, -1))
        for n, issued in first
    ]


def lives(ledger: sqlite3.Connection, feed: str) -> Iterator[Life]:
    """Of every group that was issued or carried over, by id; and of ids in between that never were."""
    known = launches(ledger, feed)
    if not known:
        return
    rows = ledger.execute(_ATTEMPTS, (feed,))
    attempts = {group_id: list(of_it) for group_id, of_it in groupby(rows, key=itemgetter("group_id"))}
    ids = {*attempts, *(group_id for launch in known for group_id in launch.carried)}
    everything = ids | set(range(known[0].first, max(ids, default=-1) + 1))
    for group_id in sorted(everything):
        yield _life(group_id, attempts.get(group_id, []), known)


def _life(group_id: int, attempts: Sequence[sqlite3.Row], known: Sequence[Launch]) -> Life:
    last = known[-1]
    steps = sorted(row["step"] for row in attempts if row["trained"])
    if steps:
        return Life(group_id=group_id, end="trained", problem=_twice(group_id, steps, attempts, last))
    live = [row for row in attempts if row["void_by"] is None]
    if not live:
        return _unissued(group_id, last)
    return _untrained(group_id, live[-1], last)


def _twice(group_id: int, steps: Sequence[int], attempts: Sequence[sqlite3.Row], last: Launch) -> str:
    if len(steps) > 1:
        return f"group {group_id} was trained {len(steps)} times, in steps {spans(steps)}"
    trained = next(row for row in attempts if row["trained"])
    carried = trained["launch"] < last.number and group_id in last.carried
    if carried or any(row["id"] > trained["id"] and row["void_by"] is None for row in attempts):
        return f"group {group_id} was trained in step {steps[0]} and issued again"
    return ""


def _unissued(group_id: int, last: Launch) -> Life:
    """A group without an attempt that counts."""
    if last.awaits(group_id):
        return Life(group_id=group_id, end="to be issued again")
    problem = f"group {group_id} was passed over: launch {last.number} neither carried nor issued it"
    return Life(group_id=group_id, end="lost", problem=problem)


def _untrained(group_id: int, newest: sqlite3.Row, last: Launch) -> Life:
    """A group whose newest attempt that still counts did not end in training."""
    if newest["dropped"] is not None and not newest["again"]:
        return Life(group_id=group_id, end=f"given up: {newest['dropped']}")
    if newest["launch"] == last.number:
        return Life(group_id=group_id, end=_outstanding(newest))
    if group_id in last.carried:
        return Life(group_id=group_id, end="to be issued again")
    then = f"{_outstanding(newest)} when launch {newest['launch']} ended"
    problem = f"group {group_id} was {then}, and never issued again"
    return Life(group_id=group_id, end="lost", problem=problem)


def _outstanding(row: sqlite3.Row) -> str:
    if row["dropped"] is not None:
        return "to be issued again"
    if row["step"] is not None and row["in_batch"]:
        return "in a batch"
    if row["admitted"]:
        return "ready"
    return "in flight"


# --- checks -----------------------------------------------------------------------------------------------------------
def once(ledger: sqlite3.Connection, feed: str) -> Check:
    """Every group has one end."""
    ends: Counter[str] = Counter()
    problems = []
    for life in lives(ledger, feed):
        ends[life.end] += 1
        problems += [life.problem] if life.problem else []
    counts = ", ".join(f"{count:,} {end}" for end, count in sorted(ends.items(), key=lambda item: -item[1]))
    return Check(
        name=f"prompts ({FEEDS[feed]})",
        claim="every prompt was trained once, given up with a reason, or is outstanding",
        numbers=f"{plural(ends.total(), 'group')}: {counts}" if ends else "no group was issued",
        problems=tuple(problems),
    )


def order(ledger: sqlite3.Connection, feed: str) -> Check:
    """Every task of every epoch was issued once."""
    known = launches(ledger, feed)
    last = known[-1].number if known else 0
    rows = ledger.execute(_POSITIONS, {"feed": feed, "launch": last}).fetchall()
    sizes = ledger.execute(
        "SELECT environment, tasks, position FROM feeds WHERE feed = ? ORDER BY launch DESC", (feed,)
    ).fetchall()
    begun = {environment: (tasks, position) for environment, tasks, position in sizes}  # the first launch's come last
    problems: list[str] = []
    for environment, of_it in groupby(rows, key=itemgetter("environment")):
        problems += _order_problems(environment, list(of_it), *begun[environment])
    return Check(
        name=f"order ({FEEDS[feed]})",
        claim="no task of an epoch was passed over or issued under two ids",
        numbers=", ".join(_epochs(name, rows, tasks) for name, (tasks, _) in sorted(begun.items())) or "no task",
        problems=tuple(problems),
    )


def _order_problems(environment: str, rows: Sequence[sqlite3.Row], tasks: int, begun: int) -> Iterator[str]:
    positions = Counter(row["position"] for row in rows)
    for position in sorted(position for position, count in positions.items() if count > 1):
        ids = sorted(row["group_id"] for row in rows if row["position"] == position)
        yield f"{environment}: position {position} of the order belongs to groups {spans(ids)}"
    missing = sorted(set(range(begun, max(positions) + 1)) - set(positions))
    if missing:
        yield f"{environment}: positions {spans(missing)} of the order were passed over"
    in_epoch = Counter((row["position"] // tasks, row["task"]) for row in rows)
    for (epoch, task), count in sorted(in_epoch.items()):
        if count > 1:
            yield f"{environment}: task {task} was issued {count} times in epoch {epoch}"


def _epochs(environment: str, rows: Sequence[sqlite3.Row], tasks: int) -> str:
    newest = max((row["position"] for row in rows if row["environment"] == environment), default=-1)
    return f"{environment}: {(newest + 1) / tasks:.2f} epochs of {plural(tasks, 'task')}"
