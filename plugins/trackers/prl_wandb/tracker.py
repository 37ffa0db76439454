"""The wandb tracker. Called by the controller only.

Evaluations finish whenever they finish, often after later steps were logged, and wandb drops what arrives with an older
step. So nothing is logged against wandb's own step: curves have `step` for their x axis, held-out ones `eval/version`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from prl.compose.config import Run
from prl.run_dir import RunDir
from prl.types import Group

from prl_wandb import WandbConfig


class WandbTracker:
    """One wandb run, whose files lie in the run directory under `wandb/`."""

    def __init__(self, config: WandbConfig, run_dir: RunDir) -> None:
        self._config = config
        self._run_dir = run_dir
        self._run: Any = None

    def start(self) -> None:
        self._run = wandb.init(
            project=self._config.project,
            entity=self._config.entity or None,
            mode=self._config.mode,
            name=self._config.name or self._run_dir.path.name,
            tags=self._config.tags,
            dir=self._run_dir.path,
            config=self._resolved_config(),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("eval/*", step_metric="eval/version")

    def _resolved_config(self) -> dict[str, Any]:
        with self._run_dir.config.open("rb") as file:
            return tomllib.load(file)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, "step": step})

    def groups(self, step: int, groups: Sequence[Group]) -> None:
        """Rollouts stay in the run directory."""

    def finish(self, error: BaseException | None) -> None:
        self._run.finish(exit_code=1 if error else 0)


def build(config: WandbConfig, run: Run, run_dir: Path) -> WandbTracker:
    return WandbTracker(config, RunDir(run_dir))
