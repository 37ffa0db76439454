"""What the ledger says a launch came to, and the first thing in which a replay differs from it."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from prl.dispatch.batches import PreparedBatch
from prl.errors import RunError
from prl.ledger import chain
from prl.ledger.store import member, rollout_row
from prl.types import Manifest

_BATCHES = "SELECT step, digest FROM batches WHERE launch = ? AND void_by IS NULL"
_VERSIONS = "SELECT version, manifest, chain FROM versions WHERE launch = ? AND void_by IS NULL"
_BEGUN = """
    SELECT l.manifest, v.chain FROM launches l LEFT JOIN versions v ON v.version = l.step AND v.void_by IS NULL
    WHERE l.launch = ?
"""
_ROLLOUTS = """
    SELECT i.group_id, r.* FROM batches b JOIN members m ON m.batch = b.id JOIN issues i ON i.id = m.issue
    JOIN rollouts r ON r.issue = i.id WHERE b.launch = ? AND b.step = ? AND b.void_by IS NULL
"""
_COMPARED = ("length", "tokens", "reward", "truncated", "versions", "advantage")


@attrs.frozen(kw_only=True)
class Difference:
    """The first thing that is not as it was."""

    step: int
    """That was being formed or trained; 0: before the first."""
    what: str
    recorded: str
    replayed: str
    detail: str = ""


class DiffersError(RunError):
    """Ends a replay."""

    def __init__(self, difference: Difference) -> None:
        super().__init__(f"step {difference.step} differs: {difference.what}")
        self.difference = difference


@attrs.define(kw_only=True, eq=False)
class Recorded:
    """A launch in the ledger; `check_*` raise DiffersError."""

    launch: int
    ledger: sqlite3.Connection
    first: str
    """Digest of the weights it began with."""
    batches: Mapping[int, str]
    """Step -> digest of its batch."""
    versions: Mapping[int, tuple[str, str]]
    """Version -> digest of its weights (empty: not published), chain."""
    _chain: str
    """Of the newest version that was compared."""

    @classmethod
    def of(cls, ledger: sqlite3.Connection, launch: int) -> Recorded:
        first, begun = ledger.execute(_BEGUN, (launch,)).fetchone()
        return cls(
            launch=launch,
            ledger=ledger,
            first=first or "",
            batches=dict(map(tuple, ledger.execute(_BATCHES, (launch,)))),
            versions={version: (digest, link) for version, digest, link in ledger.execute(_VERSIONS, (launch,))},
            chain=begun or chain.GENESIS,
        )

    def check_first(self, step: int, manifest: Manifest) -> None:
        """The weights that the trainer starts from."""
        _equal(step, "the weights it begins with", self.first, chain.manifest_digest(manifest))

    def check_batch(self, prepared: PreparedBatch) -> None:
        """Every column of a batch."""
        step = prepared.batch.step
        recorded, replayed = self.batches[step], chain.batch_digest(prepared.batch)
        if recorded != replayed:
            raise DiffersError(
                Difference(
                    step=step,
                    what="the batch",
                    recorded=recorded,
                    replayed=replayed,
                    detail=self._detail(prepared),
                )
            )

    def check_weights(self, prepared: PreparedBatch, manifest: Manifest | None) -> None:
        """The weights that a step made, if they were published, and the chain of all before."""
        step, digest = prepared.batch.step, chain.manifest_digest(manifest)
        recorded, link = self.versions[step]
        _equal(step, "the weights it made", recorded or "not published", digest or "not published")
        self._chain = chain.link(self._chain, digest, chain.batch_digest(prepared.batch))
        _equal(step, "the chain of its version", link, self._chain)

    def _detail(self, prepared: PreparedBatch) -> str:
        """The first number of its rollouts that the ledger knows to be another, or that it knows of none."""
        rows = {
            (row["group_id"], row["member"]): row
            for row in self.ledger.execute(_ROLLOUTS, (self.launch, prepared.batch.step))
        }
        for scored in prepared.groups:
            for rollout, advantage in zip(scored.group.rollouts, scored.advantages, strict=True):
                row = rows.get((scored.group.group_id, member(rollout)))
                if row is None:
                    return f"rollout {rollout.rollout_id} was not in it"
                here = {**rollout_row(rollout), "advantage": advantage}
                name = next((name for name in _COMPARED if row[name] != here[name]), None)
                if name is not None:
                    return f"rollout {rollout.rollout_id}: {name} was {row[name]!r}, and is {here[name]!r}"
        return (
            "its rollouts' lengths, rewards, versions and advantages are the same: tokens or log-probabilities are not"
            if rows
            else ""
        )


def check_states(step: int, recorded: Mapping[str, Any], replayed: Mapping[str, Any]) -> None:
    """What the next launch started from, and the controller as it is when its checkpoint begins."""
    for name in sorted(recorded.keys() | replayed.keys()):
        _equal(step, f"the {name} of its checkpoint", repr(recorded.get(name)), repr(replayed.get(name)))


def check_sentences(step: int, recorded: str, replayed: Sequence[str]) -> None:
    """A decision of the controller."""
    _equal(step, "what the controller does", recorded, "; ".join(replayed) or "nothing")


def _equal(step: int, what: str, recorded: str, replayed: str) -> None:
    if recorded != replayed:
        raise DiffersError(Difference(step=step, what=what, recorded=recorded, replayed=replayed))
