"""How `prl launch` and `prl resume` start what they have made ready: now, or when the run before it has finished."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

import attrs

from prl.cli.launch import INTERRUPTED
from prl.cli.runs import is_over
from prl.compose import chain
from prl.compose.plan import LaunchPlan
from prl.errors import PrlError
from prl.providers import ProcessLauncher
from prl.run_dir import SUPERVISOR, RunDir, read_json

POLL_SECONDS = 0.5


def start(launcher: ProcessLauncher, planned: LaunchPlan) -> int:
    """Launch; the exit code."""
    given = ready(launcher, planned)
    return INTERRUPTED if given is None else launcher.launch(given)


def ready(launcher: ProcessLauncher, planned: LaunchPlan) -> LaunchPlan | None:
    """The plan, once the run that it follows has finished, or its launcher waits for that; None: the user would not.

    A PrlError says why it never will be.
    """
    given = following(launcher, planned)
    if given.after is None and (before := chain.awaited(planned.run_dir)) is not None:
        try:
            if not _wait(planned.run_dir, before):
                return None
            chain.settle(planned.run_dir)
        except PrlError as error:
            _tell_state(planned.run_dir, "failed", str(error))
            raise
    return given


def following(launcher: ProcessLauncher, planned: LaunchPlan, before: RunDir | None = None) -> LaunchPlan:
    """The plan, with the run it follows where the launcher can wait for that; `before`: as chain.json has it."""
    before = before or chain.awaited(planned.run_dir)
    follows = getattr(launcher, "follows", None)
    left = before is not None and not chain.has_finished(before) and follows is not None and follows(before)
    return attrs.evolve(planned, after=before) if left else planned


def _wait(run_dir: RunDir, before: RunDir) -> bool:
    """Until the run before is over; False when this one is asked to stop first."""
    if chain.has_finished(before):
        return True
    print(f"waiting for {before.path}", flush=True)
    _tell_state(run_dir, "waiting", "")
    this = {"pid": os.getpid(), "host": socket.gethostname(), "log": str(run_dir.logs()), "started": time.time()}
    run_dir.write_json(run_dir.processes, [{"role": SUPERVISOR, "index": 0, **this}])
    try:
        while not is_over(before):
            if run_dir.stop.exists():
                _tell_state(run_dir, "stopped", "")
                return False
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        _tell_state(run_dir, "stopped", "interrupted while it waited")
        raise
    _tell_state(run_dir, "starting", "")
    return True


def _tell_state(run_dir: RunDir, status: str, error: str) -> None:
    state: dict[str, Any] = read_json(run_dir.state) or {}
    run_dir.write_json(run_dir.state, state | {"status": status, "error": error, "updated": time.time()})
