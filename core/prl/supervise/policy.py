"""What becomes of a process that ended or hung, and how often: decisions without processes, clocks or files.

    exit code 1, 2, 3        the process said why it will not do this: final
    a signal, a hang         an accident: tried again
    any other (70, 75)       an accident, once the run was under way; before that, a mistake that a restart repeats

An engine or environment worker is restarted by itself; without its trainer or controller a run goes on from its newest
checkpoint. Both as often as `[failures]` allows, counted in steps of the run: what keeps dying while nothing new is
trained is given up.
"""

from __future__ import annotations

import signal
from collections import defaultdict

import attrs

from prl.compose.config import FailureSection
from prl.errors import LockError, RunError, UserError

UNFORESEEN = 70
"""Exit code of a process that ended with a traceback (EX_SOFTWARE of sysexits.h)."""
LONGEST_PAUSE = 64.0  # seconds
FINAL = frozenset({RunError.exit_code, UserError.exit_code, LockError.exit_code})
SIGNALLED = 128  # shells and schedulers report signal n as 128 + n


def is_accident(code: int, *, under_way: bool) -> bool:
    """Whether a restart may help after that exit code (negative: minus a signal's number)."""
    if code < 0 or code > SIGNALLED:
        return True
    return under_way and code not in FINAL


def how_it_ended(code: int) -> str:
    """`exited with code 7`, `was ended by SIGKILL`."""
    return f"exited with code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


@attrs.define(eq=False)
class RestartBudget:
    """Restarts of each process within the last `window` steps of the run.

    Example:
        >>> budget = RestartBudget(FailureSection(restarts=2, window=10, backoff=1.0))
        >>> [budget.spend("engine-0", step) for step in (5, 5, 6, 20)]
        [0.0, 1.0, None, 0.0]
    """

    section: FailureSection
    _spent: defaultdict[str, list[int]] = attrs.field(factory=lambda: defaultdict(list))
    """Process -> the furthest step of the run at each of its restarts."""

    def spend(self, name: str, step: int) -> float | None:
        """Seconds to wait before the process is started again; None when it is given up. `step` never decreases."""
        spent = self._spent[name] = [at for at in self._spent[name] if at > step - self.section.window]
        if len(spent) >= self.section.restarts:
            return None
        spent.append(step)
        return min(self.section.backoff * 2 ** (len(spent) - 2), LONGEST_PAUSE) if len(spent) > 1 else 0.0

    def exhausted(self, name: str) -> str:
        """Why a process is given up."""
        count, window = len(self._spent[name]), self.section.window
        if not count:
            return "failures.restarts = 0 allows no restart"
        return f"it was restarted {count} times while the run trained fewer than {window} steps; it is given up"
