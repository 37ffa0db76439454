"""Start a run's processes here, wait, and leave none behind.

    start all -> wait for whichever comes first -> end what is left
                   controller exits      its exit code is the run's
                   another one fails     the user is told which and why; the run failed
                   Ctrl-C or SIGTERM     once: ask the controller to stop; twice: end everything now

Each child leads a session of its own, so the terminal's Ctrl-C reaches only this process. One thread per child waits
for its exit and one queue carries exits and signals to the supervising thread, which decides alone.
"""

from __future__ import annotations

import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import attrs
from prl.compose.plan import LaunchPlan, Process
from prl.errors import LockError, RunError
from prl.run_dir import RunDir, read_json

from prl_local.excerpt import excerpt

GRACE_SECONDS = 10.0
INTERRUPTED = 130


def build(config: object, run_dir: Path) -> LocalLauncher:
    """`[launcher] type = "local"`; the plan names the run directory."""
    del config, run_dir
    return LocalLauncher()


@attrs.define(eq=False)
class Child:
    """A started process."""

    process: Process
    popen: subprocess.Popen[bytes]
    log: Path


Event: TypeAlias = "Child | int"
"""A child that exited, or the number of a signal that arrived here."""


@attrs.frozen(kw_only=True)
class LocalLauncher:
    """A `ProcessLauncher` for one machine."""

    grace: float = GRACE_SECONDS
    """Seconds that processes have to end by themselves, and again after SIGTERM."""

    def render(self, plan: LaunchPlan) -> str:
        """One line per process: name, what it is given, environment and command."""
        lines = []
        for process in plan.processes:
            environment = " ".join(f"{key}={value}" for key, value in process.env.items())
            cores = f"{process.cpus} cpu" + (f", {process.gpus} gpu" if process.gpus else "")
            lines.append(f"  {process.name:<14} {cores:<7} {environment} {shlex.join(process.argv)}")
        return "\n".join(lines)

    def launch(self, plan: LaunchPlan) -> int:
        """Run the processes of the plan; the controller's exit code, or that of the failure that ended the run."""
        supervisor = Supervisor(plan.run_dir, self.grace)
        with supervisor.signals():
            try:
                supervisor.start(plan.processes)
                return supervisor.wait()
            finally:
                supervisor.end_all()


class Supervisor:
    """The processes of one run, from their start to the end of the last."""

    def __init__(self, run_dir: RunDir, grace: float) -> None:
        self._run_dir = run_dir
        self._grace = grace
        self._children: list[Child] = []
        # At most one entry per child and per signal; SimpleQueue is the one whose put is safe in a signal handler.
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._interrupts = 0

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM become events for as long as this lasts."""
        handlers = {
            number: signal.signal(number, lambda received, _: self._events.put(received))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def start(self, processes: tuple[Process, ...]) -> None:
        """Start all and write processes.json."""
        started: list[dict[str, Any]] = []
        for process in processes:
            child = self._spawn(process)
            started.append(
                {
                    "role": process.role,
                    "index": process.index,
                    "pid": child.popen.pid,
                    "host": socket.gethostname(),
                    "log": str(child.log),
                    "started": time.time(),
                }
            )
        self._run_dir.write_json(self._run_dir.processes, started)

    def _spawn(self, process: Process) -> Child:
        log = self._run_dir.logs() / f"{process.name}.log"
        with log.open("ab") as file:
            popen = subprocess.Popen(
                process.argv,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **process.env},
                stdin=subprocess.DEVNULL,
                stdout=None if process.role == "controller" else file,
                stderr=file,
                start_new_session=True,
            )
        child = Child(process, popen, log)
        self._children.append(child)
        threading.Thread(target=self._report_exit, args=(child,), name=process.name, daemon=True).start()
        return child

    def _report_exit(self, child: Child) -> None:
        child.popen.wait()
        self._events.put(child)

    def wait(self) -> int:
        """Until the controller exits, another process fails or the user insists; the exit code of the run."""
        while True:
            event = self._events.get()
            if not isinstance(event, Child):
                self._interrupts += 1
                if self._interrupts > 1:
                    return self._interrupted()
                _tell("stopping after the current step (again to end every process now)")
                self._run_dir.stop.touch()
            elif event.process.role == "controller":
                return self._controller_exited(event)
            elif event.popen.returncode != 0:
                return self._failed(event)

    def _controller_exited(self, child: Child) -> int:
        code = child.popen.returncode
        if code != 0:
            sentence = _failure(child)
            state = read_json(self._run_dir.state) or {}
            if state.get("status") != "failed":
                self._write_state("failed", sentence)
            _tell(f"the run failed: {sentence}")
            return code if code > 0 else 128 - code
        self._drain()
        return 0

    def _drain(self) -> None:
        """The controller has told the others to stop: wait for them, up to the grace."""
        deadline = time.monotonic() + self._grace
        for child in self._children:
            try:
                child.popen.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _tell(f"{child.process.name} did not end within {self._grace:.0f} s of the run's end; ending it")

    def _interrupted(self) -> int:
        _tell("ending every process now")
        self.end_all()
        self._write_state("stopped", "interrupted twice")
        return INTERRUPTED

    def _failed(self, child: Child) -> int:
        sentence = _failure(child)
        _tell(f"the run failed: {sentence}")
        self.end_all()
        self._write_state("failed", sentence)
        return LockError.exit_code if child.popen.returncode == LockError.exit_code else RunError.exit_code

    def _write_state(self, status: str, error: str) -> None:
        """The controller owns state.json while it lives: this is the last word on a run that it could not finish."""
        state = read_json(self._run_dir.state) or {}
        state |= {"status": status, "error": error, "updated": time.time()}
        self._run_dir.write_json(self._run_dir.state, state)

    def end_all(self) -> None:
        """SIGTERM what is left, then SIGKILL what is left of that, with everything it started."""
        left = [child for child in self._children if child.popen.poll() is None]
        for child in left:
            child.popen.terminate()
        deadline = time.monotonic() + self._grace
        for child in left:
            try:
                child.popen.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(child.popen.pid, signal.SIGKILL)
                child.popen.wait()


def _failure(child: Child) -> str:
    code = child.popen.returncode
    how = f"exited with code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
    return f"{child.process.name} {how}\n{excerpt(child.log)}\nlog: {child.log}"


def _tell(sentence: str) -> None:
    print(f"prl: {sentence}", file=sys.stderr, flush=True)
