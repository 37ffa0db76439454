"""One process at a time starts a run's processes: who launches or resumes a run holds a lock on a file of it.

The kernel gives the lock back when its holder ends, however it ends. Between hosts it holds where the filesystem keeps
locks for all of them, as NFS does.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from prl.errors import UserError
from prl.run_dir import RunDir

POLL_SECONDS = 0.1


class ClaimedError(UserError):
    """Another process launches or resumes the run."""


@contextmanager
def claimed(run_dir: RunDir, *, patience: float = 0.0) -> Iterator[None]:
    """Nobody else launches or resumes the run meanwhile; ClaimedError when somebody still does after `patience` s."""
    deadline = time.monotonic() + patience
    try:
        file = run_dir.claim.open("a")
    except OSError as error:
        raise UserError(f"{run_dir.path} cannot be written to: {error.strerror}") from None
    with file:
        while not _locked(file):
            if time.monotonic() > deadline:
                raise ClaimedError(f"{run_dir.path} is launched or resumed by another prl; `prl stop` ends it")
            time.sleep(POLL_SECONDS)
        yield


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a filesystem that keeps no locks
        return True
    return True
