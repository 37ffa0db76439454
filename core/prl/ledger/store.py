"""Facts become rows. Synchronous, one thread at a time; the rest of the controller talks to `prl.ledger.writer`.

A row is written when its fact is known and completed later (an issue is placed, arrives, is dropped); nothing is ever
deleted. Keeps in memory only what is open: issues that have not ended and batches that are not done.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from prl.ledger import chain, facts, schema
from prl.types import Batch, Manifest, Rollout


@attrs.frozen
class _OpenBatch:
    """A batch that is formed and not done."""

    row: int
    digest: str
    keys: tuple[tuple[str, int], ...]
    """(feed, group id) of its members."""


class Store:
    """One launch's hold on the ledger.

    Example:
        >>> store = Store(path)
        >>> store.write([(time.time(), facts.Started())])
    """

    def __init__(self, path: Path) -> None:
        self._connection = schema.open_for_writing(path)
        self.launch = self._next("launches", "launch")
        self._issues = itertools.count(self._next("issues", "id"))
        self._batches = itertools.count(self._next("batches", "id"))
        self._open: dict[tuple[str, int], int] = {}
        """(feed, group id) -> row of its issue."""
        self._open_batches: dict[int, _OpenBatch] = {}
        """By step."""
        self.chain = chain.GENESIS
        """Of the newest version."""

    def _next(self, table: str, column: str) -> int:
        newest: int | None = self._connection.execute(f"SELECT max({column}) FROM {table}").fetchone()[0]
        return (newest or 0) + 1

    def write(self, entries: Sequence[tuple[float, facts.Fact]]) -> None:
        """(seconds since the epoch, fact) pairs, in one transaction: after a kill, all of them are there or none."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            for at, fact in entries:
                self._apply(fact, at)
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # a full disk, among others, has ended it already
                self._connection.execute("ROLLBACK")
            raise

    def chain_of(self, version: int) -> str:
        """Of a version that was made."""
        query = "SELECT chain FROM versions WHERE version = ? AND void_by IS NULL"
        chain_of: str = self._connection.execute(query, (version,)).fetchone()[0]
        return chain_of

    def close(self) -> None:
        self._connection.close()

    @functools.singledispatchmethod
    def _apply(self, fact: Any, at: float) -> None:
        raise TypeError(f"the ledger knows no fact {type(fact).__name__}")

    # --- launches -----------------------------------------------------------------------------------------------------
    @_apply.register
    def _(self, fact: facts.Started, at: float) -> None:
        self._insert("launches", launch=self.launch, started_at=at)

    @_apply.register
    def _(self, fact: facts.Continued, at: float) -> None:
        self._update(
            "launches",
            self.launch,
            step=fact.step,
            source=fact.source,
            chain=fact.chain,
            max_staleness=fact.max_staleness,
            groups_per_step=fact.groups_per_step,
            group_size=fact.group_size,
            samples_per_step=fact.samples_per_step,
        )
        self._undo(fact)
        for feed, state in fact.feeds.items():
            self._feed(feed, state)
        self.chain = fact.chain

    def _undo(self, fact: facts.Continued) -> None:
        """What came after the cut did not lead to these weights: later steps, later attempts at outstanding groups."""
        void = "SET void_by = ? WHERE void_by IS NULL AND"
        self._connection.execute(f"UPDATE batches {void} step > ?", (self.launch, fact.step))
        self._connection.execute(f"UPDATE versions {void} version > ?", (self.launch, fact.step))
        for feed, state in fact.feeds.items():
            issues = f"UPDATE issues {void} feed = ? AND"
            self._connection.execute(f"{issues} group_id >= ?", (self.launch, feed, state["issued"]))
            self._connection.executemany(
                f"{issues} group_id = ? AND attempt >= ?",
                [(self.launch, feed, issue["group_id"], issue["attempt"]) for issue in state["outstanding"]],
            )

    def _feed(self, feed: str, state: Any) -> None:
        for environment, tasks in state["sizes"].items():
            self._insert(
                "feeds",
                launch=self.launch,
                feed=feed,
                issued=state["issued"],
                environment=environment,
                tasks=tasks,
                position=state["positions"][environment],
            )
        for issue in state["outstanding"]:
            self._insert(
                "carried",
                launch=self.launch,
                feed=feed,
                group_id=issue["group_id"],
                attempt=issue["attempt"],
                environment=issue["task"]["environment"],
                task=issue["task"]["index"],
                position=issue["position"],
            )

    @_apply.register
    def _(self, fact: facts.Ended, at: float) -> None:
        self._update("launches", self.launch, ended_at=at, status=fact.status, error=fact.error)

    # --- a prompt's life ----------------------------------------------------------------------------------------------
    @_apply.register
    def _(self, fact: facts.Issued, at: float) -> None:
        row, issue = next(self._issues), fact.issue
        self._open[fact.feed, issue.group_id] = row
        self._insert(
            "issues",
            id=row,
            launch=self.launch,
            feed=fact.feed,
            group_id=issue.group_id,
            attempt=issue.attempt,
            environment=issue.task.environment,
            task=issue.task.index,
            position=issue.position,
            issued_at=at,
        )

    @_apply.register
    def _(self, fact: facts.Placed, at: float) -> None:
        row = self._open["rl", fact.group_id]
        self._update("issues", row, engine=fact.engine, worker=fact.worker, version=fact.version, placed_at=at)

    @_apply.register
    def _(self, fact: facts.Arrived, at: float) -> None:
        group, row = fact.group, self._open["rl", fact.group.group_id]
        self._update("issues", row, arrived_at=at, admitted=fact.admitted)
        self._connection.executemany(
            "INSERT INTO rollouts (issue, member, length, tokens, reward, truncated, oldest, newest, versions)"
            " VALUES (:issue, :member, :length, :tokens, :reward, :truncated, :oldest, :newest, :versions)",
            [{"issue": row, **rollout_row(rollout)} for rollout in group.rollouts],
        )
        for failure in group.failures:
            done = f"group {group.group_id} goes on without it"
            self._failure(at, who=failure.rollout_id, where=failure.where, sentence=failure.error, done=done)

    @_apply.register
    def _(self, fact: facts.Dropped, at: float) -> None:
        row = self._open.pop(("rl", fact.group_id))
        self._update("issues", row, dropped=fact.reason, again=fact.again, ended_at=at)

    # --- batches and versions -----------------------------------------------------------------------------------------
    @_apply.register
    def _(self, fact: facts.Formed, at: float) -> None:
        row, batch, digest = next(self._batches), fact.batch, chain.batch_digest(fact.batch)
        keys = tuple((fact.feed, group_id) for group_id in fact.group_ids)
        self._open_batches[batch.step] = _OpenBatch(row, digest, keys)
        self._insert(
            "batches",
            id=row,
            launch=self.launch,
            step=batch.step,
            version=batch.version,
            phase=batch.phase,
            token_counts=json.dumps(dict(batch.token_counts)),
            digest=digest,
            formed_at=at,
            **_contents(batch),
        )
        members = [(row, ordinal, self._open[key]) for ordinal, key in enumerate(keys)]
        self._connection.executemany("INSERT INTO members VALUES (?, ?, ?)", members)
        self._connection.executemany(
            "UPDATE rollouts SET advantage = ? WHERE issue = ? AND member = ?",
            [
                (advantage, self._open[fact.feed, scored.group.group_id], member(rollout))
                for scored in fact.groups
                for rollout, advantage in zip(scored.group.rollouts, scored.advantages, strict=True)
            ],
        )

    @_apply.register
    def _(self, fact: facts.Handed, at: float) -> None:
        self._update("batches", self._open_batches[fact.step].row, handed_at=at)

    @_apply.register
    def _(self, fact: facts.Trained, at: float) -> None:
        done = self._open_batches.pop(fact.step)
        self._update("batches", done.row, done_at=at)
        self._version(at, fact.step, fact.manifest, batch=done.digest)
        for key in done.keys:
            del self._open[key]

    @_apply.register
    def _(self, fact: facts.Loaded, at: float) -> None:
        """The version is on record already, or this is where the record begins."""
        manifest, version = fact.manifest, fact.manifest.version
        digest = chain.manifest_digest(manifest)
        self._update("launches", self.launch, manifest=digest)
        known = self._connection.execute(
            "SELECT chain FROM versions WHERE version = ? AND void_by IS NULL", (version,)
        ).fetchone()
        if known is not None:
            self.chain = known[0]
        else:
            self._version(at, version, manifest, batch="", inherited=self.chain)

    def _version(self, at: float, version: int, manifest: Manifest | None, *, batch: str, inherited: str = "") -> None:
        """The next link, or the one that a checkpoint of another record ended with."""
        digest = chain.manifest_digest(manifest)
        parent = chain.GENESIS if inherited else self.chain
        self.chain = inherited or chain.link(parent, digest, batch)
        self._insert(
            "versions",
            version=version,
            launch=self.launch,
            parent=parent,
            batch=batch,
            manifest=digest,
            chain=self.chain,
            made_at=at,
        )

    @_apply.register
    def _(self, fact: facts.Served, at: float) -> None:
        self._connection.execute(
            "UPDATE versions SET served_at = ?, served_seconds = ? WHERE version = ? AND void_by IS NULL",
            (at, fact.seconds, fact.version),
        )

    # --- the rest -----------------------------------------------------------------------------------------------------
    @_apply.register
    def _(self, fact: facts.EngineChanged, at: float) -> None:
        self._insert(
            "engines",
            launch=self.launch,
            at=at,
            engine=fact.engine,
            event=fact.event,
            version=fact.version,
            detail=fact.detail,
        )

    @_apply.register
    def _(self, fact: facts.Saved, at: float) -> None:
        self._insert("checkpoints", launch=self.launch, step=fact.step, path=fact.path, saved_at=at)

    @_apply.register
    def _(self, fact: facts.Taken | facts.Demonstrated | facts.Cut | facts.Loads, at: float) -> None:
        """What only the event log keeps."""

    @_apply.register
    def _(self, fact: facts.Failed, at: float) -> None:
        self._failure(at, who=fact.who, where=fact.where, sentence=fact.sentence, done=fact.done)

    def _failure(self, at: float, *, who: str, where: str, sentence: str, done: str) -> None:
        self._insert("failures", launch=self.launch, at=at, who=who, place=where, sentence=sentence, done=done)

    def _insert(self, table: str, **values: Any) -> None:
        marks = ", ".join("?" * len(values))
        self._connection.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks})", tuple(values.values()))

    def _update(self, table: str, row: int, **values: Any) -> None:
        assignments = ", ".join(f"{name} = ?" for name in values)
        self._connection.execute(f"UPDATE {table} SET {assignments} WHERE rowid = ?", (*values.values(), row))


# --- columns ----------------------------------------------------------------------------------------------------------
def rollout_row(rollout: Rollout) -> dict[str, Any]:
    """What the table has of a rollout when it arrives, by column."""
    versions, counts = run_lengths(rollout)
    coded = ",".join(f"{version}:{count}" for version, count in zip(versions, counts, strict=True))
    oldest, newest = (min(versions), max(versions)) if versions else (None, None)
    return {
        "member": member(rollout),
        "length": sum(counts),
        "tokens": len(rollout.tokens),
        "reward": rollout.reward,
        "truncated": rollout.truncated,
        "oldest": oldest,
        "newest": newest,
        "versions": coded,
    }


def run_lengths(rollout: Rollout) -> tuple[list[int], list[int]]:
    """Versions of the sampled tokens in their order, and how many tokens each run of one version has."""
    versions = rollout.versions[rollout.sampled]
    starts = np.flatnonzero(np.diff(versions, prepend=versions[:1] - 1))
    return versions[starts].tolist(), np.diff(starts, append=len(versions)).tolist()


def member(rollout: Rollout) -> int:
    return int(rollout.rollout_id.rpartition(".")[2])


def _contents(batch: Batch) -> dict[str, int | None]:
    """Tokens, sampled tokens, and the staleness of the sampled ones, read from the columns themselves."""
    micro_batches = [micro for rank in batch.ranks for micro in rank]
    versions = np.concatenate([micro.versions[micro.own][micro.sampled[micro.own]] for micro in micro_batches])
    return {
        "tokens": sum(len(micro.tokens[micro.own]) for micro in micro_batches),
        "sampled": len(versions),
        "staleness_min": batch.version - int(versions.max()) if len(versions) else None,
        "staleness_max": batch.version - int(versions.min()) if len(versions) else None,
    }
