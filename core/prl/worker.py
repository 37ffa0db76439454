"""`prl worker`: one process of a run. It verifies the lock, then becomes its role.

Started by a launcher (and by the trainer's elastic agent, for its ranks). Ends itself when whatever started it dies, so
that no worker outlives its run, and gives signs of life to whoever supervises the run. Imports torch only through the
role.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from prl.compose.compose import open_run
from prl.errors import PrlError
from prl.run_dir import RunDir
from prl.supervise.attach import STACKS, stacks_file
from prl.supervise.beats import BEAT_SECONDS, Beat
from prl.supervise.policy import UNFORESEEN

ROLES = {
    "controller": "prl.dispatch.controller",
    "environment": "prl.rollout.worker",
    "engine": "prl.weights.engines",
    "engine-part": "prl.weights.engine_parts",
    "replay": "prl.replay.worker",
    "trainer": "prl.train.agent",
    "trainer-rank": "prl.train.worker",
}
"""Role -> module whose `main` runs it."""
INDEXED = frozenset({"environment", "engine", "engine-part", "trainer"})
"""Roles whose `main` is told its index; a trainer rank reads RANK from its environment."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(run_dir: RunDir, role: str, index: int) -> int:
    """Run a role to its end; the exit code of the process."""
    rank = os.environ.get("RANK", "0")
    name = f"{role}-{rank if role == 'trainer-rank' else index}"
    _live_with_parent(os.getppid(), Beat(run_dir, name))
    _end_gracefully_on_sigterm()
    tell_stacks_on_request(run_dir, name)
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
    except Exception:
        traceback.print_exc()
        return UNFORESEEN


def _live_with_parent(parent: int, beat: Callable[[], None]) -> None:
    """Give signs of life until the parent is gone, and end then.

    Linux kills the process itself, even one that is stopped; elsewhere it must notice.
    """
    with suppress(AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            beat()
            time.sleep(BEAT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _end_gracefully_on_sigterm() -> None:
    """SIGTERM means what Ctrl-C means: asyncio cancels its main task, anything else sees KeyboardInterrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


def tell_stacks_on_request(run_dir: RunDir, name: str) -> None:
    """From the handler of the signal itself: a process that is stuck in a library or a lock answers too."""
    faulthandler.register(STACKS, file=stacks_file(run_dir, name).open("w"))
