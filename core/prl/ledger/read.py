"""Reading a ledger while it is written, and after its writer was killed. Never changes the file.

A kill in the middle of a commit leaves a journal that the next reader would have to play back, which needs the right
to write, and is wrong where a writer on another machine still lives. So such a pair of files is copied and played back
in the copy. Readers work on a snapshot in memory and hold the file's lock only while they copy it.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from prl.errors import RunError
from prl.ledger import schema

_COPIES = 10  # tries at a copy that nobody wrote to meanwhile


def exists(path: Path) -> bool:
    """Whether there is a ledger with anything in it."""
    return path.is_file() and path.stat().st_size > 0


def snapshot(path: Path) -> sqlite3.Connection:
    """Everything that was committed until now, as a database in memory with rows that know their columns.

    RunError when there is no ledger, or none that this prl reads.
    """
    if not exists(path):
        raise RunError(f"there is no ledger at {path}: the run has not begun, or was made before prl kept one")
    memory = sqlite3.connect(":memory:")
    try:
        with opened(path) as ledger:
            ledger.backup(memory)
    except sqlite3.Error as error:
        raise RunError(f"cannot read the ledger {path}: {error}") from error
    schema.check(memory, path)
    memory.row_factory = sqlite3.Row
    return memory


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that sees one moment of the ledger, for a few quick questions: the writer waits meanwhile."""
    with tempfile.TemporaryDirectory(prefix="prl-ledger-") as folder:
        connection = _connected(path)
        try:
            _begin(connection)
        except sqlite3.OperationalError as error:
            connection.close()
            if error.sqlite_errorcode != sqlite3.SQLITE_READONLY_ROLLBACK:
                raise
            connection = sqlite3.connect(_copied(path, Path(folder)), isolation_level=None)
            _begin(connection)
        try:
            yield connection
        finally:
            connection.close()


def _connected(path: Path) -> sqlite3.Connection:
    uri = f"file:{quote(str(path))}?mode=ro"
    return sqlite3.connect(uri, uri=True, timeout=schema.BUSY_SECONDS, isolation_level=None)


def _begin(connection: sqlite3.Connection) -> None:
    """A transaction begins with its first read, which is what meets a journal."""
    connection.execute("BEGIN")
    connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()


def _copied(path: Path, folder: Path) -> Path:
    """The ledger and its journal as they were at one moment; RunError when somebody writes all the time."""
    files = (path, path.with_name(f"{path.name}-journal"))
    for _ in range(_COPIES):
        before = [_stamp(file) for file in files]
        for file, stamp in zip(files, before, strict=True):
            (folder / file.name).unlink(missing_ok=True)
            if stamp is not None:
                shutil.copyfile(file, folder / file.name)
        if [_stamp(file) for file in files] == before:
            return folder / path.name
    raise RunError(f"{path} is being written by a process that holds no lock on it; try again when the run is over")


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


# --- columns ----------------------------------------------------------------------------------------------------------
def run_lengths(versions: str) -> list[tuple[int, int]]:
    """`"3:120,4:17"` as (version, tokens) pairs."""
    pairs = (run.split(":") for run in versions.split(",") if run)
    return [(int(version), int(tokens)) for version, tokens in pairs]


# --- one answer -------------------------------------------------------------------------------------------------------
def last_failure(path: Path) -> str:
    """The newest failure on record and what was done about it; empty where there is none."""
    if not exists(path):
        return ""
    try:
        with opened(path) as ledger:
            schema.check(ledger, path)
            row = ledger.execute("SELECT who, sentence, done FROM failures ORDER BY rowid DESC LIMIT 1").fetchone()
    except sqlite3.Error as error:
        raise RunError(f"cannot read the ledger {path}: {error}") from error
    return "" if row is None else f"{row[0]}: {row[1]} ({row[2]})"
