"""A server never outlives the run it belongs to: the kernel ends each of its processes with the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """SIGKILL when the parent dies, here and in processes forked from here. Linux only; elsewhere nothing happens."""
    if sys.platform == "linux":
        _ask_for_signal()
        os.register_at_fork(after_in_child=_ask_for_signal)


def _ask_for_signal() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
