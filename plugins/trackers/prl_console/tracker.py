"""The console tracker: chooses the live or the plain form and feeds it. Called by the controller only."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from prl.compose.config import Run
from prl.types import Group
from rich.console import Console

from prl_console import ConsoleConfig, lines
from prl_console.live import LiveDisplay
from prl_console.view import RunView, phase_of


class Output(Console):
    """Where nobody reads any more it goes quiet; rich would end the process, and with the controller the run."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, self.file.fileno())  # what is buffered has to go somewhere at exit
        os.close(devnull)


class ConsoleTracker:
    """Shows a run on standard output."""

    def __init__(self, view: RunView, console: Console, *, interval: float) -> None:
        self._view = view
        self._console = console
        self._interval = interval
        self._lock = threading.Lock()
        live = console.is_terminal and not console.is_dumb_terminal
        self._live = LiveDisplay(view, console, interval=interval, lock=self._lock) if live else None
        self._last_line = float("-inf")

    def start(self) -> None:
        if self._live:
            self._live.start()
        else:
            self._print(f"{self._view.name}: {self._view.steps} steps, files in {self._view.directory}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        with self._lock:
            self._view.update(step, metrics)
        if self._live is None:
            self._log_line(phase_of(metrics))

    def _log_line(self, phase: str) -> None:
        view = self._view
        if phase == "eval":
            self._print(lines.evaluation_line(view))
        elif view.clock() - self._last_line >= self._interval or view.step == view.steps:
            self._last_line = view.clock()
            self._print(lines.step_line(view))

    def groups(self, step: int, groups: Sequence[Group]) -> None:
        """Rollouts are for `prl report`; the console shows numbers only."""

    def finish(self, error: BaseException | None) -> None:
        if self._live:
            self._live.stop()
        for line in lines.summary(self._view, error):
            self._print(line)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def build(config: ConsoleConfig, run: Run, run_dir: Path) -> ConsoleTracker:
    view = RunView(name=run_dir.name, directory=as_typed(run_dir), steps=run.warmup.steps + run.run.steps)
    return ConsoleTracker(view, Output(), interval=config.interval)


def as_typed(path: Path, *, relative_to: Callable[[], str] = os.getcwd) -> str:
    """The shorter of the relative and the absolute form of a path."""
    relative = os.path.relpath(path, relative_to())
    return relative if not relative.startswith("..") else str(path)
