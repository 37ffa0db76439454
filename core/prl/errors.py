"""Every error prl raises on purpose.

    PrlError
    ├── UserError            what a person wrote is wrong; exit code 2
    │   ├── ConfigError      a config file or --set: carries every problem found, with dotted paths
    │   └── PluginError      a named plugin is missing, broken, incompatible or in conflict
    ├── LockError            a process sees other plugin code than the run was launched with; exit code 3
    └── RunError             the run failed; exit code 1
        ├── InfrastructureError   an engine, environment worker or wire failed; never becomes a reward; exit code 75
        └── CheckpointError       a checkpoint is missing, damaged or foreign

The command line prints `str(error)` without a traceback; a traceback is reserved for what was not foreseen.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs


class PrlError(Exception):
    """Base of every foreseen failure; `exit_code` is what the command line returns."""

    exit_code = 1


class UserError(PrlError):
    exit_code = 2


@attrs.frozen
class Problem:
    """One thing wrong in a config: where (dotted path, may be empty) and a sentence."""

    path: str
    message: str


class ConfigError(UserError):
    """All problems of a config at once.

    Example:
        >>> print(ConfigError("run.toml", [Problem("trainer.ranks", "expected int, got str '2'")]))
        run.toml: 1 problem
          trainer.ranks   expected int, got str '2'
    """

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        width = max((len(p.path) for p in self.problems), default=0)
        noun = "problem" if len(self.problems) == 1 else "problems"
        lines = [f"{source}: {len(self.problems)} {noun}"]
        lines += [f"  {p.path:<{width}}   {p.message}" for p in self.problems]
        super().__init__("\n".join(lines))


class PluginError(UserError):
    """One or more named plugins cannot be used; the message lists all of them."""


class LockError(PrlError):
    exit_code = 3


class RunError(PrlError):
    """The run cannot go on."""


class InfrastructureError(RunError):
    """A part outside the policy failed: retried or dropped with its reason, never trained on as reward 0.

    A process that ends with it may do better when it is started again (EX_TEMPFAIL of sysexits.h).
    """

    exit_code = 75


class CheckpointError(RunError):
    """A checkpoint is missing, damaged or belongs to another config."""


def is_final(error: BaseException) -> bool:
    """Whether the process that ended with it would only end so again: it was foreseen, and no accident."""
    return isinstance(error, PrlError) and not isinstance(error, InfrastructureError)
