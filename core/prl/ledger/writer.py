"""The controller's hand in the ledger: facts are taken at once and written in a thread, in order, many at a time.

    record(fact) -> queue -> write (a thread; one transaction for whatever waits)      room, settled: who must wait

`record` never waits, so that it can be called from anywhere; instead the loops that make facts wait for `room` before
they begin something new: the queue is bounded by the backlog plus what was under way. A checkpoint waits until all that
was told before it is `settled`, so that no checkpoint is ever ahead of the ledger. A ledger that cannot be written ends
the run: a run that cannot say what it trained on is not worth its compute. The event log (`prl.ledger.event_log`) is
written by the same thread, before the ledger, so that it never lags behind; when it cannot be written, the ledger says
so and the run goes on without it.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prl.dispatch.change import Change
from prl.errors import RunError
from prl.ledger.event_log import EventLog
from prl.ledger.facts import Ended, Fact, Failed, Started
from prl.ledger.store import Store

log = logging.getLogger(__name__)

_BACKLOG = 1024  # facts; a thousand small ones take some 20 ms to write

Entry = tuple[float, Fact]


class Ledger:
    """`run` is a loop of the controller; without it nothing is written before `close`.

    Example:
        >>> ledger = Ledger(run_dir.ledger)
        >>> ledger.record(facts.Handed(step=3))
    """

    def __init__(self, path: Path, events: EventLog | None = None) -> None:
        self._path = path
        self._events = events
        self._lock = threading.Lock()
        self._store: Store | None = None
        self._change = Change()
        self._entries: list[Entry] = [(time.time(), Started())]
        self._first = 0
        """Number of the first entry that is not known to be written."""
        self._written = 0
        """Entries in the file: those of an abandoned write included."""
        self._logged = 0
        """Entries that the event log was given."""

    def record(self, fact: Fact) -> None:
        """Have a fact written soon, after everything told before."""
        self._entries.append((time.time(), fact))
        self._change.notify()

    async def room(self) -> None:
        """Wait while too much waits to be written."""
        await self._change.until(lambda: len(self._entries) < _BACKLOG)

    async def settled(self) -> str:
        """Wait until everything told so far is on disk; the chain of the newest version."""
        target = self._first + len(self._entries)
        await self._change.until(lambda: self._first >= target)
        assert self._store is not None, "something has been written"
        return self._store.chain

    async def chain_of(self, version: int) -> str:
        """The chain of a version whose making was told before, once everything told so far is on disk."""
        await self.settled()
        return await asyncio.to_thread(self._chain_of, version)

    def _chain_of(self, version: int) -> str:
        with self._lock:
            assert self._store is not None, "something has been written"
            if self._events is not None:
                self._try(self._events, self._events.sync)
            return self._store.chain_of(version)

    async def run(self) -> None:
        """Until cancelled; RunError when the ledger cannot be written."""
        while True:
            await self._change.until(lambda: bool(self._entries))
            await self._flush()

    async def close(self, *, status: str, error: str) -> None:
        """Write what is left, and how it ended. A failure is only logged: it comes too late to end the run."""
        self.record(Ended(status=status, error=error))
        try:
            await self._flush()
        except RunError as failure:
            log.error("%s", failure)
        if self._store is not None:
            self._store.close()
        if self._events is not None:
            self._events.close()

    async def _flush(self) -> None:
        entries = list(self._entries)
        await asyncio.to_thread(self._write, entries, self._first)
        del self._entries[: len(entries)]
        self._first += len(entries)
        self._change.notify()

    def _write(self, entries: Sequence[Entry], first: int) -> None:
        """In a thread. A write whose waiting task was cancelled goes on, so the next may find its entries written."""
        with self._lock:
            try:
                if self._store is None:
                    self._store = Store(self._path)
                    self._begin_events(self._store.launch)
                if self._events is not None:
                    self._try(self._events, self._events.append, entries[self._logged - first :])
                    self._logged = first + len(entries)
                self._store.write(entries[self._written - first :])
            except sqlite3.Error as error:
                raise RunError(f"the ledger {self._path} cannot be written ({error}); the run ends here") from error
            self._written = first + len(entries)

    def _begin_events(self, launch: int) -> None:
        if self._events is not None:
            self._try(self._events, self._events.begin, launch, time.time())

    def _try(self, events: EventLog, act: Callable[..., None], *arguments: Any) -> None:
        """Do something with the event log; a run is worth more than the possibility to repeat it."""
        try:
            act(*arguments)
        except (OSError, TypeError, ValueError) as error:
            self._events = None
            sentence = f"the event log cannot be written: {error}"
            done = "the run goes on; `prl replay` can repeat it up to here"
            log.error("%s; %s", sentence, done)
            assert self._store is not None, "the ledger is opened first"
            failed = Failed(who="event log", where="controller", sentence=sentence, done=done)
            self._store.write([(time.time(), failed)])
