"""The tables of `ledger.sqlite`, and how its one writer opens it.

    launches   every start of the controller: from which step, under which bound, how it ended
    feeds      where a feed stood at a launch                carried    what it had yet to issue again
    issues     every attempt at a group, and its fate        rollouts   what came of it
    batches    every step's batch                            members    the issues it is made of
    versions   every policy version, hash-chained            checkpoints
    engines    joins, departures, commits                    failures   who, where, why, what was done

A launch that continues from step S undoes whatever came after S, as the weights do: those rows stay and carry the
launch that undid them (`void_by`). Rows without it are the history of the policy.

A rollback journal, not write-ahead logging: WAL keeps its index in memory shared by all readers, which a file system
shared by several machines cannot give. `synchronous = FULL`: a commit is on disk before anyone builds on it.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from prl.errors import RunError

APPLICATION_ID = 0x70726C31  # "prl1": tells a ledger from any other SQLite file
VERSION = 1
BUSY_SECONDS = 60.0  # a reader holds its lock while it copies; nobody holds one for longer

TABLES = """
CREATE TABLE launches (
    launch INTEGER PRIMARY KEY,
    started_at REAL NOT NULL,
    step INTEGER,                   -- it continues from; NULL until everyone has said Hello
    source TEXT,                    -- checkpoint folder, empty for a fresh start
    chain TEXT,                     -- of version `step`, as the checkpoint has it
    manifest TEXT,                  -- digest of the weights it began with
    max_staleness INTEGER,          -- declared by the scheduler's config; NULL where it has no such field
    groups_per_step INTEGER,
    group_size INTEGER,
    samples_per_step INTEGER,
    ended_at REAL,                  -- NULL while it lasts, and for ever after a kill
    status TEXT,
    error TEXT
) STRICT;
CREATE TABLE feeds (
    launch INTEGER NOT NULL REFERENCES launches,
    feed TEXT NOT NULL,             -- rl or warmup
    issued INTEGER NOT NULL,        -- groups it had issued, all environments together
    environment TEXT NOT NULL,
    tasks INTEGER NOT NULL,         -- of the environment's train split: an epoch
    position INTEGER NOT NULL,      -- of the next task
    PRIMARY KEY (launch, feed, environment)
) STRICT, WITHOUT ROWID;
CREATE TABLE carried (
    launch INTEGER NOT NULL REFERENCES launches,
    feed TEXT NOT NULL,
    group_id INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    environment TEXT NOT NULL,
    task INTEGER NOT NULL,
    position INTEGER NOT NULL,
    PRIMARY KEY (launch, feed, group_id)
) STRICT, WITHOUT ROWID;
CREATE TABLE issues (
    id INTEGER PRIMARY KEY,
    launch INTEGER NOT NULL REFERENCES launches,
    feed TEXT NOT NULL,
    group_id INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    environment TEXT NOT NULL,
    task INTEGER NOT NULL,
    position INTEGER NOT NULL,      -- in the environment's order: epoch * tasks + place in the epoch
    issued_at REAL NOT NULL,
    engine INTEGER,
    worker TEXT,
    version INTEGER,                -- newest served when it was dispatched
    placed_at REAL,
    arrived_at REAL,
    admitted INTEGER NOT NULL DEFAULT 0,
    dropped TEXT,                   -- the reason
    again INTEGER,                  -- 1: to be issued again, 0: given up
    ended_at REAL,                  -- when it was dropped
    void_by INTEGER REFERENCES launches
) STRICT;
CREATE INDEX issues_by_group ON issues (feed, group_id);
CREATE TABLE rollouts (
    issue INTEGER NOT NULL REFERENCES issues,
    member INTEGER NOT NULL,
    length INTEGER NOT NULL,        -- sampled tokens
    tokens INTEGER NOT NULL,        -- all tokens
    reward REAL,                    -- NULL where the environment gave none that is a number
    truncated INTEGER NOT NULL,
    oldest INTEGER,                 -- version of any sampled token; NULL when nothing was sampled
    newest INTEGER,
    versions TEXT NOT NULL,         -- of the sampled tokens, run-length coded: "3:120,4:17"
    advantage REAL,                 -- once it is in a batch
    PRIMARY KEY (issue, member)
) STRICT, WITHOUT ROWID;
CREATE TABLE batches (
    id INTEGER PRIMARY KEY,
    launch INTEGER NOT NULL REFERENCES launches,
    step INTEGER NOT NULL,
    version INTEGER NOT NULL,       -- being trained
    phase TEXT NOT NULL,
    token_counts TEXT NOT NULL,     -- JSON: stream -> tokens
    tokens INTEGER NOT NULL,
    sampled INTEGER NOT NULL,
    staleness_min INTEGER,
    staleness_max INTEGER,
    digest TEXT NOT NULL,
    formed_at REAL NOT NULL,
    handed_at REAL,                 -- to the trainer
    done_at REAL,                   -- by all ranks: only now are its groups trained
    void_by INTEGER REFERENCES launches
) STRICT;
CREATE TABLE members (
    batch INTEGER NOT NULL REFERENCES batches,
    ordinal INTEGER NOT NULL,
    issue INTEGER NOT NULL REFERENCES issues,
    PRIMARY KEY (batch, ordinal)
) STRICT, WITHOUT ROWID;
CREATE INDEX members_by_issue ON members (issue);
CREATE TABLE versions (
    id INTEGER PRIMARY KEY,
    version INTEGER NOT NULL,
    launch INTEGER NOT NULL REFERENCES launches,
    parent TEXT NOT NULL,
    batch TEXT NOT NULL,
    manifest TEXT NOT NULL,         -- empty where the version was not published
    chain TEXT NOT NULL,
    made_at REAL NOT NULL,
    served_at REAL,
    served_seconds REAL,
    void_by INTEGER REFERENCES launches
) STRICT;
CREATE TABLE checkpoints (
    launch INTEGER NOT NULL REFERENCES launches,
    step INTEGER NOT NULL,
    path TEXT NOT NULL,
    saved_at REAL NOT NULL
) STRICT;
CREATE TABLE engines (
    launch INTEGER NOT NULL REFERENCES launches,
    at REAL NOT NULL,
    engine INTEGER NOT NULL,
    event TEXT NOT NULL,            -- joined, left or committed
    version INTEGER NOT NULL,
    detail TEXT NOT NULL
) STRICT;
CREATE TABLE failures (
    launch INTEGER NOT NULL REFERENCES launches,
    at REAL NOT NULL,
    who TEXT NOT NULL,
    place TEXT NOT NULL,
    sentence TEXT NOT NULL,
    done TEXT NOT NULL              -- about it
) STRICT;
"""


def open_for_writing(path: Path) -> sqlite3.Connection:
    """The ledger at `path`, made where there is none. Autocommit: the caller begins and commits.

    May be used from any thread, one at a time. RunError when it cannot be opened or another prl wrote it.
    """
    try:
        connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = TRUNCATE")
        connection.execute("PRAGMA synchronous = FULL")
        if not connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            _create(connection)
    except sqlite3.Error as error:
        raise RunError(f"cannot open the ledger {path}: {error}") from error
    check(connection, path)
    return connection


def _create(connection: sqlite3.Connection) -> None:
    """All tables or none: whoever is killed here leaves an empty file."""
    header = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION};"
    connection.executescript(f"BEGIN IMMEDIATE; {header} {TABLES} COMMIT;")


def check(connection: sqlite3.Connection, path: Path) -> None:
    """RunError unless the file is a ledger of this version."""
    application, version = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
    )
    if application != APPLICATION_ID:
        raise RunError(f"{path} is not a ledger: its application id is {application:#x}, expected {APPLICATION_ID:#x}")
    if version != VERSION:
        raise RunError(f"{path} has ledger format {version}, this prl reads {VERSION}; use the prl that wrote it")
