"""Checks of the policy versions: none is missing, every hash follows, and a resume begins with the same weights.

The hashes are `prl.ledger.chain`'s. Rows that a later launch undid are checked among themselves through their parents.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from prl.ledger.chain import GENESIS, link
from prl.ledger.report import Check, plural, spans

_LIVE = "SELECT * FROM versions WHERE void_by IS NULL ORDER BY version"
_USED = """
    SELECT 'engine ' || engine || ' committed' AS who, version FROM engines WHERE event = 'committed'
    UNION SELECT 'group ' || group_id || ' was dispatched at', version FROM issues WHERE version IS NOT NULL
    UNION SELECT 'the batch of step ' || step || ' was trained at', version FROM batches
    WHERE handed_at IS NOT NULL
"""


# --- no gap -----------------------------------------------------------------------------------------------------------
def gapless(ledger: sqlite3.Connection) -> Check:
    """Every version from the first to the newest is there once, made by the step of its number."""
    versions = ledger.execute(_LIVE).fetchall()
    numbers = [row["version"] for row in versions]
    published = sum(bool(row["manifest"]) for row in versions)
    served = sum(row["served_at"] is not None for row in versions)
    return Check(
        name="versions",
        claim="no gap: every version was made once, by the step of its number",
        numbers=f"versions {spans(numbers)}: {published:,} published, {served:,} served by all engines"
        if numbers
        else "no version was made",
        problems=tuple(_gaps(ledger, numbers)),
    )


def _gaps(ledger: sqlite3.Connection, numbers: list[int]) -> Iterator[str]:
    if not numbers:
        return
    root, newest = numbers[0], numbers[-1]
    missing = sorted(set(range(root, newest + 1)) - set(numbers))
    if missing:
        yield f"versions {spans(missing)} are missing"
    repeated = sorted(number for number, count in Counter(numbers).items() if count > 1)
    if repeated:
        yield f"versions {spans(repeated)} were made more than once"
    done = {step for (step,) in ledger.execute("SELECT step FROM batches WHERE done_at > 0 AND void_by IS NULL")}
    made = set(numbers) - {root}
    if made - done:
        yield f"versions {spans(sorted(made - done))} exist without a batch that was trained"
    if done - made:
        yield f"steps {spans(sorted(done - made))} were trained and made no version"
    yield from _unknown(ledger)


def _unknown(ledger: sqlite3.Connection) -> Iterator[str]:
    """Versions that somebody used and nobody made; undone ones existed, too."""
    made = {version for (version,) in ledger.execute("SELECT version FROM versions")}
    for who, version in ledger.execute(_USED):
        if version not in made:
            yield f"{who} version {version}, which was never made"


# --- the chain --------------------------------------------------------------------------------------------------------
def chained(ledger: sqlite3.Connection) -> Check:
    """Every link recomputed, from the digests and the parent on record."""
    versions = ledger.execute("SELECT * FROM versions ORDER BY id").fetchall()
    live = [row for row in versions if row["void_by"] is None]
    return Check(
        name="chain",
        claim="every version's hash follows from its parent's, its batch's and its weights'",
        numbers=f"{plural(len(versions), 'link')}, newest {live[-1]['chain'][:16]}" if live else "no link",
        problems=(*_broken_links(versions, _begun_with(ledger)), *_parents(live), *_foreign_batches(ledger)),
    )


def _begun_with(ledger: sqlite3.Connection) -> set[str]:
    """Chains that checkpoints of other records ended with: a record may begin with one."""
    return {chain for (chain,) in ledger.execute("SELECT chain FROM launches WHERE step > 0") if chain}


def _broken_links(versions: list[sqlite3.Row], inherited: set[str]) -> Iterator[str]:
    for row in versions:
        root = row["parent"] == GENESIS and row["batch"] == "" and row["chain"] in inherited
        if not root and row["chain"] != link(row["parent"], row["manifest"], row["batch"]):
            yield f"the hash of version {row['version']} does not follow from what it covers"


def _parents(live: list[sqlite3.Row]) -> Iterator[str]:
    for parent, row in pairwise(live):
        if row["parent"] != parent["chain"]:
            yield f"version {row['version']} does not follow version {parent['version']}: its parent has another hash"


def _foreign_batches(ledger: sqlite3.Connection) -> Iterator[str]:
    rows = ledger.execute(
        "SELECT v.version FROM versions v JOIN batches b ON b.step = v.version AND b.launch = v.launch"
        " WHERE v.batch != '' AND b.done_at > 0 AND v.batch != b.digest"
    )
    for (version,) in rows:
        yield f"version {version} was made by another batch than the one on record for step {version}"


# --- resuming ---------------------------------------------------------------------------------------------------------
def continued(ledger: sqlite3.Connection) -> Check:
    """Every launch began with the weights and the chain that the version it continues from ended with."""
    problems, compared = [], 0
    for launch in ledger.execute("SELECT * FROM launches WHERE manifest IS NOT NULL AND launch > 1 ORDER BY launch"):
        before = ledger.execute(
            "SELECT chain, manifest FROM versions WHERE version = ? AND launch < ? ORDER BY id DESC",
            (launch["step"], launch["launch"]),
        ).fetchone()
        if before is None:
            problems.append(f"launch {launch['launch']} continues from step {launch['step']}, which is not on record")
            continue
        compared += bool(before["manifest"])
        problems += _differences(launch, before)
    return Check(
        name="resumes",
        claim="every launch began with the weights of the version it continues from",
        numbers=f"{plural(compared, 'resume')} compared with the weights as they were published",
        problems=tuple(problems),
    )


def _differences(launch: sqlite3.Row, before: sqlite3.Row) -> Iterator[str]:
    where = f"launch {launch['launch']} continues from step {launch['step']}"
    if launch["chain"] and launch["chain"] != before["chain"]:
        yield f"{where} of another record: its checkpoint's hash is not that of the version"
    if before["manifest"] and launch["manifest"] != before["manifest"]:
        yield f"{where} with other weights than were published then"
