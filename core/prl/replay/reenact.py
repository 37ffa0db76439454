"""The controller's decisions again, one event at a time, by the very objects that a run is controlled with.

    event of the log ──► what the controller did at that moment (dispatcher, warm-up, credit, packing)
                              │ decisions ──► witness ──► equal to those that follow in the log?
                              ▼
                         batch ──► equal to the ledger's? ──► trainer ranks ──► weights: equal to the ledger's?

What came from outside (groups with their columns, losses, demonstrations, when a step ended and a version was served)
is taken from the log; everything else is done again. Between two events nothing happens, so neither clocks nor the
order of messages play a part. A scheduler that reads its clock is shown the times on record.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import attrs

from prl import checkpoint_dir
from prl.checkpoint_dir import CheckpointManifest
from prl.columns import ColumnFolder
from prl.compose.compose import Composition
from prl.dispatch.batches import BatchFormer, PreparedBatch
from prl.dispatch.checkpoint import ControllerState
from prl.dispatch.dispatcher import Dispatcher
from prl.dispatch.engines import EnginePool
from prl.dispatch.environments import EnvironmentPool
from prl.dispatch.parts import controller_state
from prl.dispatch.placement import GroupLostError, Placement
from prl.dispatch.progress import Progress
from prl.dispatch.trainer import Trainer, manifest_of
from prl.dispatch.warmup import WarmupBatches
from prl.errors import RunError
from prl.ledger.events import (
    Arrived,
    Continued,
    Cut,
    Demonstrated,
    Dropped,
    Event,
    Issued,
    Loads,
    Served,
    Taken,
    Trained,
    event_of,
    sentence,
)
from prl.ledger.facts import Fact
from prl.replay.compare import Recorded, check_sentences, check_states
from prl.score.costs import Costs
from prl.types import Batch, Group, Manifest

GIVEN = (Trained, Served, Loads, Cut)
"""Events that nobody in the controller decides."""


@attrs.define(eq=False)
class Witness:
    """Stands where the ledger does, and keeps what was decided until it is compared."""

    made: deque[Event] = attrs.field(factory=deque)

    def record(self, fact: Fact) -> None:
        event = event_of(fact)
        if event is not None:
            self.made.append(event)

    async def room(self) -> None:
        """Nothing is written."""


@attrs.frozen(kw_only=True, eq=False)
class Stage:
    """The parts of a controller that decide what is trained on, with no engine and no environment behind them."""

    state: ControllerState
    dispatcher: Dispatcher
    former: BatchFormer
    warmup: WarmupBatches
    witness: Witness

    @classmethod
    def build(cls, composition: Composition, continued: Continued, costs: Costs, clock: Callable[[], float]) -> Stage:
        """As they were when the launch began."""
        run, witness, saved = composition.run, Witness(), json.loads(continued.state)
        progress = Progress(steps=run.warmup.steps + run.run.steps)
        scheduler = composition.build(run.scheduler, run.rollouts.groups_per_step, clock)
        state = controller_state(composition, progress, scheduler, saved["feed"]["sizes"])
        state.load_state_dict(saved)
        engines = EnginePool([], progress.change, witness)
        environments = EnvironmentPool([], on_run=lambda request, place: None)
        dispatcher = Dispatcher(
            feed=state.feed,
            scheduler=scheduler,
            placement=Placement(engines, environments, timeout=run.rollouts.timeout),
            engines=engines,
            progress=progress,
            ledger=witness,
            most_lost=run.failures.share,
            rollouts=run.rollouts,
            seed=run.run.seed,
            clock=clock,
            on_group=lambda group, version: None,
        )
        return cls(
            state=state,
            dispatcher=dispatcher,
            former=BatchFormer(
                run=run,
                dispatcher=dispatcher,
                credit=state.credit,
                progress=progress,
                ledger=witness,
                costs=costs,
            ),
            warmup=WarmupBatches(
                run=run,
                feed=state.demonstrations,
                environments=environments,
                progress=progress,
                ledger=witness,
                costs=costs,
            ),
            witness=witness,
        )


@attrs.define(kw_only=True, eq=False)
class Reenactment:
    """One launch, from its `Continued` to step `end`; `run` raises DiffersError where it is not as it was."""

    composition: Composition
    continued: Continued
    events: Iterable[tuple[float, Event]]
    """What follows `continued`."""
    end: int
    followed_by: Continued | None
    """Of the launch that continued from the checkpoint of step `end`; None: the last step is where it ends."""
    trainer: Trainer
    costs: Costs
    """The trainer's, by which batches are packed."""
    recorded: Recorded
    columns: ColumnFolder
    on_step: Callable[[int], bool]
    """Told of every step that is equal; False: to end here."""
    trained: int = 0
    """Newest step that was compared."""
    weights: int = 0
    """Sets of weights that were compared."""
    _now: float = 0.0
    _stage: Stage = attrs.field(init=False)
    _taken: list[Group] = attrs.field(factory=list, init=False)
    _formed: deque[PreparedBatch] = attrs.field(factory=deque, init=False)
    _published: int = attrs.field(init=False, default=-1)

    def __attrs_post_init__(self) -> None:
        self.trained = self.continued.step
        self._stage = Stage.build(self.composition, self.continued, self.costs, lambda: self._now)

    async def run(self) -> None:
        """RunError when the log ends too early."""
        manifest = await self.trainer.publish()
        self.recorded.check_first(self.trained, manifest)
        await self._retire_before(manifest)
        for at, event in self.events:
            self._now = at
            if not self._stage.witness.made:
                await self._enact(event)
            self._compare(event)
            if not await self._follow(event):
                return
            await asyncio.sleep(0)  # the hub must hear of a rank that fails
        raise RunError(
            f"the event log of launch {self.recorded.launch} ends after step {self.trained}, the ledger has steps up "
            f"to {self.end}: steps {self.trained + 1} to {self.end} cannot be replayed"
        )

    # --- decisions ----------------------------------------------------------------------------------------------------
    async def _enact(self, event: Event) -> None:
        """What the controller did at this moment; the witness hears what it decides."""
        dispatcher, warmup = self._stage.dispatcher, self._stage.warmup
        match event:
            case Issued() if dispatcher.capacity() > 0:
                dispatcher.start()
            case Arrived(restored=True) if event.group.group_id in dispatcher.feed.waiting:
                dispatcher.restore([event.group])
            case Arrived() if dispatcher.runs(event.group.group_id):
                dispatcher.arrived(event.group)
            case Dropped() if dispatcher.runs(event.group_id):
                self._lose(event)
            case Dropped() | Taken():
                self._taken = dispatcher.take_now()
            case Demonstrated():
                self._formed.append(await warmup.prepare(warmup.issue(), event.samples))

    def _lose(self, event: Dropped) -> None:
        """A group in flight: for a reason from outside, or because the scheduler has said so."""
        dispatcher = self._stage.dispatcher
        if dispatcher.cuts(event.group_id) or not event.cut:
            error = GroupLostError(event.reason, "as the log has it", cut=event.cut)
            dispatcher.lost(dispatcher.feed.outstanding(event.group_id), error)

    def _compare(self, event: Event) -> None:
        made = self._stage.witness.made
        step = self._stage.state.progress.formed + 1
        if isinstance(event, GIVEN):
            if made:
                check_sentences(step, sentence(event), [sentence(decided) for decided in made])
            return
        check_sentences(step, sentence(event), [sentence(made.popleft())] if made else [])

    # --- what follows from them ---------------------------------------------------------------------------------------
    async def _follow(self, event: Event) -> bool:
        """False when this was the last that counts."""
        progress = self._stage.state.progress
        match event:
            case Taken():
                self._formed.append(await self._stage.former.prepare(self._taken))
            case Served(version):
                progress.served = version
                self._stage.dispatcher.published(version)
            case Loads(at=at, loads=loads):
                self._stage.dispatcher.observed(at, loads)
            case Trained(step):
                next_ones = [sentence(Trained(prepared.batch.step)) for prepared in self._formed]
                check_sentences(step, sentence(event), next_ones[:1])
                await self._train(self._formed.popleft())
                go_on = self.on_step(step)
                return go_on and (step < self.end or self.followed_by is not None)
            case Cut(step) if step == self.end and self.followed_by is not None:
                check_states(step, json.loads(self.followed_by.state), _plain(self._stage.state.state_dict()))
                return False
        return True

    async def _train(self, prepared: PreparedBatch) -> None:
        batch = prepared.batch
        self.recorded.check_batch(prepared)
        self._require_columns(batch)
        reports = await self.trainer.step(batch, learning_rate=prepared.learning_rate, publish=prepared.publish)
        manifest = manifest_of(reports)
        self.recorded.check_weights(prepared, manifest)
        self.trained = self._stage.state.progress.trained = batch.step
        prepared.feed.finish(prepared.issues)
        if manifest is not None:
            self.weights += 1
            await self._retire_before(manifest)

    async def _retire_before(self, manifest: Manifest) -> None:
        """No engine will fetch it; only its checksums were wanted."""
        if self._published >= 0:
            await self.trainer.retire(self._published)
        self._published = manifest.version

    def _require_columns(self, batch: Batch) -> None:
        micro_batches = [micro_batch for rank in batch.ranks for micro_batch in rank]
        samples = [pieces for micro in micro_batches for named in micro.large.values() for pieces in named]
        files = {piece.file for pieces in samples for piece in pieces}
        if missing := files - set(self.columns.files() if files else ()):
            raise RunError(
                f"step {batch.step} was trained with columns that the log does not keep ({min(missing)}, ...): it can "
                'be replayed where the run has run.event_log = "all"'
            )

    async def save(self, path: Path, identity: dict[str, Any]) -> None:
        """The trainer's part of a checkpoint, for the replay of the launch that follows."""
        await self.trainer.save(self.trained, checkpoint_dir.partial(path))
        files = await self.trainer.saved(self.trained)
        manifest = CheckpointManifest(format=checkpoint_dir.FORMAT, step=self.trained, identity=identity, files=files)
        checkpoint_dir.commit(path, manifest)
        checkpoint_dir.prune(path.parent, keep_last=1, keep_every=0)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(state))
    return plain
