"""What was left out of training, next to what was not: lengths, rewards and sources of attempts, by how they ended.

An asynchronous run drops what is slow, and slow is long, and long is often hard; so what is dropped must be looked at.
Lengths and rewards are known of attempts that arrived. An attempt that was cut in flight has none: how long it had run,
next to what trained ones took, is all that is known of it.
"""

from __future__ import annotations

import sqlite3

from prl.ledger.report import Share

ALL = "all"

_SHARES = """
    WITH trained AS (
        SELECT m.issue FROM members m JOIN batches b ON b.id = m.batch
        WHERE b.done_at IS NOT NULL AND b.void_by IS NULL
    ), attempts AS (
        SELECT id, environment, coalesce(arrived_at, ended_at) - placed_at AS seconds,
               CASE WHEN id IN trained THEN 'trained'
                    WHEN dropped IS NOT NULL THEN 'dropped: ' || dropped || iif(again, '', ', given up')
                    ELSE 'undone by a resume' END AS fate
        FROM issues WHERE feed = 'rl' AND (id IN trained OR dropped IS NOT NULL OR void_by IS NOT NULL)
    ), contents AS (
        SELECT a.*, count(r.member) AS rollouts, total(r.length) AS length, total(r.reward) AS reward
        FROM attempts a LEFT JOIN rollouts r ON r.issue = a.id GROUP BY a.id
    ), places AS (
        SELECT *, environment AS place FROM contents UNION ALL SELECT *, 'all' FROM contents
    )
    SELECT fate, place, count(*) AS attempts, sum(rollouts) AS rollouts, avg(seconds) AS seconds,
           sum(length) / nullif(sum(rollouts), 0) AS length, sum(reward) / nullif(sum(rollouts), 0) AS reward
    FROM places GROUP BY fate, place ORDER BY fate != 'trained', fate, place != 'all', place
"""
_CUT = """
    SELECT total(dropped IS NOT NULL AND arrived_at IS NULL), avg(iif(arrived_at IS NULL, ended_at - placed_at, NULL)),
           avg(arrived_at - placed_at)
    FROM issues WHERE feed = 'rl'
"""


def shares(ledger: sqlite3.Connection) -> tuple[Share, ...]:
    """One per end and environment, what was trained first; environments only where there are several."""
    found = [
        Share(
            end=row["fate"],
            environment=row["place"],
            attempts=row["attempts"],
            rollouts=row["rollouts"],
            length=row["length"],
            reward=row["reward"],
            seconds=row["seconds"],
        )
        for row in ledger.execute(_SHARES)
    ]
    several = len({share.environment for share in found} - {ALL}) > 1
    return tuple(share for share in found if several or share.environment == ALL)


def cut_in_flight(ledger: sqlite3.Connection) -> tuple[int, float | None, float | None]:
    """Attempts that ended without arriving; mean seconds they had run; mean seconds that arrivals took."""
    count, cut, arrived = ledger.execute(_CUT).fetchone()
    return int(count), cut, arrived
