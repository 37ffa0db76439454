"""Checkpoints of a run: one cut through trainer and controller between two steps, written while training goes on.

    checkpoints/step-N.partial/     while parts are written; never read
    checkpoints/step-N/             complete: renamed when everything is on disk (`prl.checkpoint_dir`)
        controller.json             step, feeds (with every task that was issued and not yet trained), scheduler,
                                    credit state, chain: the hash of the version (`prl.ledger.chain`)
        pending.groups              groups that are finished, and not trained yet: ready, or in a batch formed ahead
        columns/                    their large columns: other names of files that the run removes once it has trained
        in-flight/                  what is finished of groups in flight, written by those who roll them out

    training loop ── begin: the cut ──► ranks copy their state, and train on ──► ranks write ──► run: commit, prune

The training loop waits for nothing but the checkpoint before. A resumed run issues the tasks of groups in flight again
under their id and attempt, so that none is lost and none is trained twice; what was sampled of them until the cut, or
soon after it by no later version, is not sampled again.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from prl import checkpoint_dir
from prl.checkpoint_dir import COLUMNS, CONTROLLER_FILES, GROUPS, IN_FLIGHT, STATE, CheckpointManifest, FileRecord
from prl.columns import ColumnFolder, named_by
from prl.compose.config import CheckpointSection
from prl.dispatch import pending
from prl.dispatch.buffer import BoundedQueue
from prl.dispatch.change import Change
from prl.dispatch.feed import Feed
from prl.dispatch.progress import Progress
from prl.dispatch.trainer import Trainer
from prl.errors import CheckpointError, RunError
from prl.ledger import facts
from prl.ledger.writer import Ledger
from prl.providers import RolloutScheduler
from prl.score.credit_state import CreditState
from prl.types import Carried, Group


@attrs.frozen(kw_only=True, eq=False)
class ControllerState:
    """What the controller must know again to continue."""

    progress: Progress
    feed: Feed
    demonstrations: Feed
    scheduler: RolloutScheduler
    credit: CreditState

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.progress.trained,
            "feed": self.feed.state_dict(),
            "demonstrations": self.demonstrations.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "credit": self.credit.state_dict(self.progress.trained),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.progress.trained = self.progress.formed = self.progress.served = state["step"]
        self.feed.load_state_dict(state["feed"])
        self.demonstrations.load_state_dict(state["demonstrations"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.credit.load_state_dict(state.get("credit", {}))  # older checkpoints have none


@attrs.frozen(kw_only=True, eq=False)
class _Cut:
    """The controller's part at one moment between two steps."""

    step: int
    state: dict[str, Any]
    groups: Sequence[Group]


@attrs.define(kw_only=True, eq=False)
class Checkpoints:
    """Writes checkpoints into a folder, one at a time, and removes old ones. `run` is a loop of the controller."""

    folder: Path
    section: CheckpointSection
    identity: Mapping[str, Any]
    """Of the config, as `prl.checkpoint_dir.CheckpointManifest` has it."""
    trainer: Trainer
    state: ControllerState
    pending: Callable[[], Sequence[Group]]
    """Finished groups that no step was trained on."""
    columns: ColumnFolder
    """Of the run."""
    keep_in_flight: Callable[[Path, int], Awaitable[Sequence[Carried]]]
    """Has what is finished of groups in flight written into a folder: tokens of versions up to that one."""
    ledger: Ledger
    on_saved: Callable[[int, Path], None]
    newest: int
    """Step of the newest cut of this run, or of the checkpoint it was resumed from."""
    _cuts: BoundedQueue[_Cut] = attrs.field(init=False, factory=lambda: BoundedQueue("checkpoints", 1))
    _at: float = attrs.field(init=False, factory=time.monotonic)
    """When the newest cut was taken, or this run began."""
    _writing: bool = attrs.field(init=False, default=False)
    _keeping: bool = attrs.field(init=False, default=False)
    _change: Change = attrs.field(init=False, factory=Change)

    def due(self, step: int) -> bool:
        """Whether the config wants one after that step."""
        every, minutes = self.section.every, self.section.minutes
        by_clock = minutes > 0 and time.monotonic() - self._at >= 60 * minutes
        return by_clock or (every > 0 and step % every == 0)

    async def begin(self) -> None:
        """Take the cut; the trainer must be between two steps. Waits until the checkpoint before is complete."""
        await self.settled()
        state = self.state.state_dict()
        cut = _Cut(step=state["step"], state=state, groups=tuple(self.pending()))
        self.ledger.record(facts.Cut(cut.step))
        self.newest, self._at, self._writing, self._keeping = cut.step, time.monotonic(), True, True
        await self._keep_columns(cut)
        await self.trainer.save(cut.step, checkpoint_dir.partial(self._path(cut.step)))
        await self._cuts.put(cut)

    async def _keep_columns(self, cut: _Cut) -> None:
        """Before the next step is trained: the sweep that follows it may remove them."""
        files = named_by(cut.groups)
        if files:
            with _writing(self._path(cut.step)):
                folder = checkpoint_dir.partial(self._path(cut.step)) / COLUMNS
                await asyncio.to_thread(self.columns.lend, files, folder)

    async def kept(self) -> None:
        """Wait until the newest checkpoint has what it keeps of groups in flight, which may end then."""
        await self._change.until(lambda: not self._keeping)

    async def settled(self) -> None:
        """Wait until no checkpoint is being written."""
        await self._change.until(lambda: not self._writing)

    async def run(self) -> None:
        """Until cancelled. RunError when a checkpoint cannot be written: a run that cannot save is not left alone."""
        while (cut := await self._cuts.get()) is not None:
            await self._complete(cut)
            self._writing = False
            self._change.notify()

    async def _complete(self, cut: _Cut) -> None:
        path = self._path(cut.step)
        in_flight = await self._in_flight(cut)
        self._keeping = False
        self._change.notify()
        files = await self.trainer.saved(cut.step)
        state = {**cut.state, "chain": await self.ledger.chain_of(cut.step), "in_flight": in_flight}
        await asyncio.to_thread(self._commit, path, attrs.evolve(cut, state=state), files)
        self.ledger.record(facts.Saved(step=cut.step, path=str(path)))
        self.on_saved(cut.step, path)

    async def _in_flight(self, cut: _Cut) -> list[dict[str, Any]]:
        """What is kept of the attempts that are outstanding in this cut, as JSON; files relative to the checkpoint."""
        issues = {(issue["group_id"], issue["attempt"]) for issue in cut.state["feed"]["outstanding"]}
        folder = checkpoint_dir.partial(self._path(cut.step)) / IN_FLIGHT
        kept = [
            attrs.evolve(entry, file=f"{IN_FLIGHT}/{Path(entry.file).name}")
            for entry in await self.keep_in_flight(folder, cut.step)
            if (entry.group_id, entry.attempt) in issues
        ]
        return [attrs.asdict(entry) for entry in kept]

    def _commit(self, path: Path, cut: _Cut, files: Mapping[str, FileRecord]) -> None:
        with _writing(path):
            folder = checkpoint_dir.partial(path)
            columns = {f"{COLUMNS}/{file}" for file in named_by(cut.groups)}
            in_flight = {entry["file"] for entry in cut.state["in_flight"]}
            own = {
                STATE: checkpoint_dir.write_json(folder / STATE, cut.state),
                GROUPS: pending.write(folder / GROUPS, cut.groups),
                **{name: checkpoint_dir.record_of(folder / name) for name in sorted(columns | in_flight)},
            }
            manifest = CheckpointManifest(
                format=checkpoint_dir.FORMAT, step=cut.step, identity=self.identity, files={**own, **files}
            )
            checkpoint_dir.commit(path, manifest)
            checkpoint_dir.prune(self.folder, keep_last=self.section.keep_last, keep_every=self.section.keep_every)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step}"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        sentence = f"the checkpoint {path} cannot be written ({error}); `prl resume` goes on from the last"
        raise RunError(sentence) from error


# --- reading ----------------------------------------------------------------------------------------------------------
@attrs.frozen(kw_only=True, eq=False)
class Restored:
    """The controller's part of a checkpoint."""

    state: Mapping[str, Any]
    chain: str
    groups: Sequence[Group]
    in_flight: Sequence[Carried]


def read(path: Path) -> Restored:
    """The controller's part, verified; CheckpointError says what is wrong with it."""
    manifest = checkpoint_dir.read_manifest(path)
    own = [*CONTROLLER_FILES, *_files_in(COLUMNS, manifest), *_files_in(IN_FLIGHT, manifest)]
    checkpoint_dir.verify(path, manifest, own)
    state = json.loads((path / STATE).read_text())
    in_flight = [Carried(**{**entry, "file": str(path / entry["file"])}) for entry in state.get("in_flight", ())]
    return Restored(state=state, chain=state["chain"], groups=pending.read(path / GROUPS), in_flight=in_flight)


def restore_columns(path: Path, columns: ColumnFolder) -> None:
    """Have the large columns of a checkpoint's groups in the run's own folder, where everybody looks for them."""
    files = [Path(name).name for name in _files_in(COLUMNS, checkpoint_dir.read_manifest(path))]
    try:
        ColumnFolder(path / COLUMNS).lend(files, columns.path)
    except OSError as error:
        raise CheckpointError(f"the columns of checkpoint {path} cannot be put into {columns.path}: {error}") from error


def _files_in(folder: str, manifest: CheckpointManifest) -> list[str]:
    return [name for name in manifest.files if name.startswith(f"{folder}/")]
