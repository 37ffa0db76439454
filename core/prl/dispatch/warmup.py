"""Demonstrations become the batches of the supervised warm-up, one step ahead of the trainer.

    feed -> demonstrate (environments) -> pack -> batches         waits for room in `batches`, then for demonstrations

Only the ce stream occurs. Has a feed of its own, so that the order of tasks in the rl phase does not depend on the
warm-up. Engines get the weights once, at the end of the phase.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from prl.compose.config import Run
from prl.dispatch.batches import PreparedBatch, pack_batch
from prl.dispatch.buffer import BoundedQueue
from prl.dispatch.environments import EnvironmentPool
from prl.dispatch.feed import Feed, Issue
from prl.dispatch.progress import Progress
from prl.errors import InfrastructureError, RunError
from prl.ledger import facts
from prl.ledger.facts import FactSink
from prl.score.costs import Costs
from prl.train.schedule import learning_rate
from prl.types import Sample, TaskRef


@attrs.frozen(kw_only=True, eq=False)
class WarmupBatches:
    """Forms the batches of the warm-up."""

    run: Run
    feed: Feed
    environments: EnvironmentPool
    progress: Progress
    ledger: FactSink
    costs: Costs
    """By which batches are packed: the trainer's."""

    async def form(self, batches: BoundedQueue[PreparedBatch]) -> None:
        """Every batch up to the last step of the warm-up, then close `batches`."""
        while self.progress.formed < self.run.warmup.steps:
            await batches.room()
            issues = self.issue()
            samples = await self._demonstrations([issue.task for issue in issues])
            await batches.put(await self.prepare(issues, samples))
        batches.close()

    def issue(self) -> list[Issue]:
        """The tasks of the next batch."""
        issues = [self.feed.next() for _ in range(self.run.warmup.samples_per_step)]
        for issue in issues:
            self.ledger.record(facts.Issued(feed="warmup", issue=issue))
        return issues

    async def prepare(self, issues: Sequence[Issue], samples: Sequence[Sample]) -> PreparedBatch:
        """The next batch, of the demonstrations of those tasks."""
        section = self.run.warmup
        group_ids = tuple(issue.group_id for issue in issues)
        self.ledger.record(facts.Demonstrated(group_ids=group_ids, samples=tuple(samples)))
        batch = await pack_batch(samples, self.run, self.costs, self.progress.formed, phase="warmup")
        self.progress.formed += 1
        self.ledger.record(facts.Formed(feed="warmup", batch=batch, group_ids=group_ids, groups=()))
        return PreparedBatch(
            batch=batch,
            learning_rate=learning_rate(self.run.schedule, section.learning_rate, batch.step, section.steps),
            publish=batch.step == section.steps,
            feed=self.feed,
            issues=group_ids,
        )

    async def _demonstrations(self, tasks: list[TaskRef]) -> list[Sample]:
        samples = await self._demonstrated(tasks)
        if not any(weights.any() for sample in samples for weights in sample.weights.values()):
            raise RunError("the environments demonstrate nothing; set warmup.steps = 0 to start without a warm-up")
        return samples

    async def _demonstrated(self, tasks: list[TaskRef]) -> list[Sample]:
        """Asked again, of whoever is there then, as often as a rollout is."""
        failure: BaseException | None = None
        for _ in range(self.run.rollouts.retries + 1):
            try:
                return await self.environments.demonstrate(tasks)
            except* InfrastructureError as errors:
                failure = errors.exceptions[0]
        raise RunError(f"the warm-up needs demonstrations and got none: {failure}")
