"""The trainer's loop: a batch, a step, new weights announced, and the next batch at once.

    batches -> TrainStep -> StepDone -> announce to publication, report, begin a checkpoint, ask for an evaluation

Waits for a batch (from `batches` or `warmup`) and for the trainer, and for nothing else: engines take over the new
weights while the next step trains. A run that is asked to stop finishes the step it is in.
"""

from __future__ import annotations

import asyncio
import time

import attrs

from prl.compose.config import Run
from prl.dispatch.batches import PreparedBatch
from prl.dispatch.buffer import BoundedQueue
from prl.dispatch.checkpoint import Checkpoints
from prl.dispatch.engines import EnginePool
from prl.dispatch.evaluation import Evaluator
from prl.dispatch.progress import Progress
from prl.dispatch.reporting import Reporter, StepOutcome
from prl.dispatch.trainer import Trainer, manifest_of
from prl.ledger import facts
from prl.ledger.writer import Ledger
from prl.messages import StepDone
from prl.weights.publish import Publisher


@attrs.define(kw_only=True, eq=False)
class TrainingLoop:
    """Trains what it is given, in order."""

    run: Run
    trainer: Trainer
    publisher: Publisher
    engines: EnginePool
    reporter: Reporter
    checkpoints: Checkpoints
    evaluator: Evaluator
    progress: Progress
    ledger: Ledger
    stopping: asyncio.Event
    _last_end: float = 0.0

    async def train(self, batches: BoundedQueue[PreparedBatch]) -> None:
        """Until `batches` is closed and empty, or the run is asked to stop."""
        self._last_end = time.monotonic()
        while not self.stopping.is_set():
            prepared = await batches.get()
            if prepared is None or self.stopping.is_set():
                return
            await self._step(prepared)

    async def _step(self, prepared: PreparedBatch) -> None:
        await self.ledger.room()
        self.ledger.record(facts.Handed(step=prepared.batch.step))
        reports = await self.trainer.step(
            prepared.batch, learning_rate=prepared.learning_rate, publish=prepared.publish
        )
        step = prepared.batch.step
        self.progress.trained = step
        prepared.feed.finish(prepared.issues)
        manifest = manifest_of(reports)
        self.ledger.record(facts.Trained(step=step, manifest=manifest))
        if manifest is not None:
            self.publisher.announce(manifest)
        self.engines.poll()
        await self.reporter.queue.put(self._outcome(prepared, reports))
        if self.checkpoints.due(step):
            await self.checkpoints.begin()
        if prepared.batch.phase == "rl" and step < self.progress.steps:
            self.evaluator.request(step)

    def _outcome(self, prepared: PreparedBatch, reports: list[StepDone]) -> StepOutcome:
        now = time.monotonic()
        seconds, self._last_end = now - self._last_end, now
        return StepOutcome(prepared=prepared, reports=reports, seconds=seconds)
