"""Where processes run, who watches, and what lifecycle hooks are told. See `prl.providers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import attrs

from prl.providers.provider import Provider, Ref

if TYPE_CHECKING:
    from prl.compose.config import Run
    from prl.compose.plan import LaunchPlan
    from prl.run_dir import RunDir
    from prl.types import Group


@attrs.frozen(kw_only=True)
class Launcher(Provider):
    """Where processes run."""

    build: Ref
    """`(config, run_dir: Path) -> ProcessLauncher`"""


class ProcessLauncher(Protocol):
    def render(self, plan: LaunchPlan) -> str:
        """What would be started, as text, with no side effect (`prl launch --dry-run`)."""

    def check(self, plan: LaunchPlan) -> None:
        """Refuse what cannot be started, with a PrlError, before anything is written."""

    def launch(self, plan: LaunchPlan) -> int:
        """Start every process, wait for the run, stop what is left; the exit code of the run.

        Or hand the run over to a system that does this, write `launch.json` and return 0; then there is `remote`.
        """


class HandingLauncher(ProcessLauncher, Protocol):
    def remote(self, run_dir: RunDir) -> RemoteRun:
        """The run that `launch.json` says was handed over."""


class FollowingLauncher(HandingLauncher, Protocol):
    def follows(self, run_dir: RunDir) -> bool:
        """Whether it can have the run of a plan wait for that one (`LaunchPlan.after`); else the command line waits.

        What it then starts calls `prl.compose.chain.settle` before it opens the run.
        """


class SweepingLauncher(ProcessLauncher, Protocol):
    def launch_all(self, plans: Sequence[LaunchPlan], folder: Path) -> int:
        """The runs of a sweep at once, where the launcher has a way to; without it they go one after the other."""


class RemoteRun(Protocol):
    """A run that another system keeps, as the command line asks for it from anywhere.

    InfrastructureError when that system does not answer.
    """

    def rows(self) -> list[list[str]]:
        """(name, value) lines for `prl status`; never raises."""

    def over(self) -> bool:
        """Whether nothing of it runs or waits to run; may be asked often."""

    def stop(self) -> None:
        """The stop file is there: take back what does not run yet; what runs reads the file and ends by itself."""

    def cancel(self) -> None:
        """End what is left of it now."""

    def attach(self, process: str, host: str, arguments: Sequence[str]) -> int:
        """Run Python with these arguments in this terminal, where that process of the run lives; its exit code."""


@attrs.frozen(kw_only=True)
class Tracker(Provider):
    """Where metrics are shown. Runs in the controller; a tracker that raises is reported and never stops a run."""

    build: Ref
    """`(config, run: Run, run_dir: Path) -> MetricTracker`"""


class MetricTracker(Protocol):
    def start(self) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one step (or of one evaluation, under `eval/`)."""

    def groups(self, step: int, groups: Sequence[Group]) -> None:
        """The groups a step was made of."""

    def finish(self, error: BaseException | None) -> None: ...


@attrs.frozen(kw_only=True)
class RunInfo:
    """What lifecycle hooks are told about the run."""

    run: Run
    run_dir: Path
