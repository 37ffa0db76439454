"""Checkpoints of a run: the trainer's part from its ranks, the controller's part from here.

    checkpoints/step-N.partial/     while ranks write; never read
    checkpoints/step-N/             complete: renamed when everything is on disk
        controller.json             step, feeds (with every task that was issued and not yet trained), scheduler,
                                    chain: the hash of the version (`prl.ledger.chain`)

A checkpoint is taken between two steps, so its parts belong together. Groups in flight or ready are not stored: their
tasks are, and a resumed run issues them again, so that none is lost and none is trained twice.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from prl.dispatch.feed import Feed
from prl.dispatch.progress import Progress
from prl.dispatch.trainer import Trainer
from prl.errors import CheckpointError
from prl.ledger import facts
from prl.ledger.writer import Ledger
from prl.providers import RolloutScheduler

_FORMAT = 2
_FILE = "controller.json"


@attrs.frozen(kw_only=True, eq=False)
class ControllerState:
    """What the controller must know again to continue."""

    progress: Progress
    feed: Feed
    demonstrations: Feed
    scheduler: RolloutScheduler

    def state_dict(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "step": self.progress.trained,
            "feed": self.feed.state_dict(),
            "demonstrations": self.demonstrations.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.progress.trained = self.progress.formed = self.progress.served = state["step"]
        self.feed.load_state_dict(state["feed"])
        self.demonstrations.load_state_dict(state["demonstrations"])
        self.scheduler.load_state_dict(state["scheduler"])


@attrs.define(kw_only=True, eq=False)
class Checkpoints:
    """Writes checkpoints into a folder and keeps the newest `keep_last` of them (0: all)."""

    folder: Path
    keep_last: int
    trainer: Trainer
    state: ControllerState
    ledger: Ledger
    on_saved: Callable[[int, Path], None]
    newest: int = -1
    """Step of the newest checkpoint of this run, or of the one it was resumed from."""

    async def save(self) -> None:
        """The trainer must be between two steps."""
        state = self.state.state_dict()
        step = state["step"]
        state["chain"] = await self.ledger.settled()
        partial, path = self.folder / f"step-{step}.partial", self.folder / f"step-{step}"
        await asyncio.to_thread(_make_empty, partial)
        await self.trainer.save(step, partial)
        await asyncio.to_thread(_commit, partial, path, state)
        await asyncio.to_thread(self._prune)
        self.newest = step
        self.ledger.record(facts.Saved(step=step, path=str(path)))
        self.on_saved(step, path)

    def _prune(self) -> None:
        if self.keep_last:
            steps = sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*[0-9]"))
            for step in steps[: -self.keep_last]:
                shutil.rmtree(self.folder / f"step-{step}")


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _commit(partial: Path, path: Path, state: Mapping[str, Any]) -> None:
    (partial / _FILE).write_text(json.dumps(state, indent=1))
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


def read(path: Path) -> dict[str, Any]:
    """The controller's part of a checkpoint; CheckpointError says what is wrong with it."""
    try:
        state: dict[str, Any] = json.loads((path / _FILE).read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"checkpoints.resume: {path} is no complete checkpoint (it has no {_FILE}); name a folder step-N"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"checkpoints.resume: {path / _FILE} is damaged: {error}") from None
    if state.get("format") != _FORMAT:
        raise CheckpointError(
            f"checkpoints.resume: {path} has format {state.get('format')!r}, this prl reads {_FORMAT}"
        )
    return state
