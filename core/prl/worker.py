"""`prl worker`: one process of a run. It verifies the lock, then becomes its role.

Started by a launcher (and by the trainer's elastic agent, for its ranks). Ends itself when whatever started it dies, so
that no worker outlives its run. Imports torch only through the role.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from prl.compose.compose import open_run
from prl.errors import PrlError
from prl.run_dir import RunDir

ROLES = {
    "controller": "prl.dispatch.controller",
    "environment": "prl.rollout.worker",
    "engine": "prl.weights.engines",
    "replay": "prl.replay.worker",
    "trainer": "prl.train.agent",
    "trainer-rank": "prl.train.worker",
}
"""Role -> module whose `main` runs it."""
INDEXED = frozenset({"environment", "engine", "trainer"})
"""Roles whose `main` is told its index; a trainer rank reads RANK from its environment."""
PARENT_POLL_SECONDS = 0.5


def main(run_dir: RunDir, role: str, index: int) -> int:
    """Run a role to its end; the exit code of the process."""
    _die_with_parent(os.getppid())
    _end_gracefully_on_sigterm()
    try:
        composition = open_run(run_dir)
        run_role: Callable[..., int | None] = importlib.import_module(ROLES[role]).main
        arguments: list[Any] = [composition, run_dir, index]
        return run_role(*arguments[: 3 if role in INDEXED else 2]) or 0
    except PrlError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGTERM


def _die_with_parent(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _end_gracefully_on_sigterm() -> None:
    """SIGTERM means what Ctrl-C means: asyncio cancels its main task, anything else sees KeyboardInterrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
