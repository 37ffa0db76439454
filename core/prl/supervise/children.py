"""The processes of one attempt: started through the launcher, waited for, ended, and listed in processes.json.

One thread per process waits for its exit; one queue carries exits and signals to the supervising thread, which alone
decides what they mean (`prl.supervise.supervisor`). How a process starts and dies on its host is the launcher's.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, TypeAlias

import attrs

from prl.compose.plan import Process
from prl.run_dir import SUPERVISOR, RunDir


class Handle(Protocol):
    """A started process, as the launcher holds it."""

    @property
    def pid(self) -> int:
        """Of the process that the launcher started, on this host."""

    @property
    def host(self) -> str:
        """Where it runs, by way of that process."""

    def wait(self) -> int:
        """Block until it has ended; its exit code, minus the number of the signal that ended it."""

    def terminate(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """End it and everything it started, now; also called when it has ended by itself."""


Spawn: TypeAlias = Callable[[Process, Path], Handle]
"""Start a process that appends what it writes to the log."""


@attrs.define(eq=False, kw_only=True)
class Child:
    """One life of a process."""

    process: Process
    handle: Handle
    log: Path
    started: float
    """Seconds since the epoch."""
    code: int = 0
    """Once it has ended."""
    killed_because: str = ""
    """Why it was killed from here."""
    ended: threading.Event = attrs.field(factory=threading.Event)

    @property
    def name(self) -> str:
        return self.process.name


Event: TypeAlias = "Child | int"
"""A child that ended, or the number of a signal that arrived here."""


class Children:
    """At most one living child per process of the plan."""

    def __init__(self, run_dir: RunDir, spawn: Spawn, *, grace: float) -> None:
        self._run_dir = run_dir
        self._spawn = spawn
        self._grace = grace
        self._children: dict[str, Child] = {}
        # At most one entry per child and per signal; SimpleQueue is the one whose put is safe in a signal handler.
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    @property
    def living(self) -> list[Child]:
        return [child for child in self._children.values() if not child.ended.is_set()]

    def start(self, *processes: Process) -> None:
        """Start processes, in place of earlier lives of them."""
        for process in processes:
            log = self._run_dir.logs() / f"{process.name}.log"
            handle = self._spawn(process, log)
            child = Child(process=process, handle=handle, log=log, started=time.time())
            self._children[process.name] = child
            threading.Thread(target=self._report_end, args=(child,), name=process.name, daemon=True).start()
        self._list()

    def _report_end(self, child: Child) -> None:
        child.code = child.handle.wait()
        child.handle.kill()  # what it started must not outlive it
        child.ended.set()
        self._events.put(child)

    def _list(self) -> None:
        entries = [
            {
                "role": child.process.role,
                "index": child.process.index,
                "pid": child.handle.pid,
                "host": child.handle.host,
                "log": str(child.log),
                "started": child.started,
            }
            for child in self._children.values()
        ]
        self._run_dir.write_json(self._run_dir.processes, entries)

    def signalled(self, number: int) -> None:
        """A signal arrived; may be called from its handler."""
        self._events.put(number)

    def event(self, timeout: float) -> Event | None:
        """The next signal or end of a child that has no successor yet; None when there was none for so long."""
        try:
            event = self._events.get(timeout=timeout)
        except queue.Empty:
            return None
        known = isinstance(event, int) or self._children.get(event.name) is event
        return event if known else None

    # --- the end ------------------------------------------------------------------------------------------------------
    def drain(self) -> list[str]:
        """Wait for processes that were told to end, up to the grace; the names of those that did not."""
        self._wait(self._children.values())
        return [child.name for child in self.living]

    def end(self) -> None:
        """SIGTERM what is left, then SIGKILL what is left of that, with everything it started."""
        left = self.living
        for child in left:
            child.handle.terminate()
        self._wait(left)
        self.kill()

    def kill(self) -> None:
        """SIGKILL what is left, with everything it started, and forget all."""
        for child in self.living:
            child.handle.kill()
        for child in self._children.values():
            child.ended.wait()
        self._children.clear()

    def vacate(self) -> None:
        """As `kill`, between two attempts: the run goes on as long as this process does, which is listed alone."""
        where = {"pid": os.getpid(), "host": socket.gethostname(), "log": str(self._run_dir.logs())}
        entry = {"role": SUPERVISOR, "index": 0, **where, "started": time.time()}
        self._run_dir.write_json(self._run_dir.processes, [entry])
        self.kill()

    def _wait(self, children: Iterable[Child]) -> None:
        deadline = time.monotonic() + self._grace
        for child in children:
            child.ended.wait(max(0.0, deadline - time.monotonic()))
