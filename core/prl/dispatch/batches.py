"""Ready groups become the next batch while the trainer is busy with the one before.

    dispatcher.take -> credit -> pack -> batches             waits for room in `batches`, then for enough ready groups

One batch is formed ahead, never more. Knows nothing of engines or the trainer; the controller runs `form` in the rl
phase, and `prl.dispatch.warmup` in its place before that.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from typing import Literal

import attrs

from prl.compose.config import Run
from prl.dispatch.buffer import BoundedQueue
from prl.dispatch.dispatcher import Dispatcher
from prl.dispatch.feed import Feed
from prl.dispatch.progress import Progress
from prl.ledger import facts
from prl.ledger.facts import FactSink
from prl.score.costs import Costs
from prl.score.credit import Scored, score
from prl.score.credit_state import CreditState
from prl.score.pack import pack
from prl.train.schedule import learning_rate
from prl.types import Batch, Group, Sample

_PACKED_IN_PLACE = 1 << 18  # tokens; packing more takes milliseconds, which the event loop should not lose


@attrs.frozen(kw_only=True, eq=False)
class PreparedBatch:
    """A batch and what the loops need to know about it."""

    batch: Batch
    learning_rate: float
    publish: bool
    """Whether engines get the weights it yields."""
    feed: Feed
    issues: tuple[int, ...]
    """Ids under which `feed` knows the tasks it was made of."""
    groups: tuple[Scored, ...] = ()


@attrs.frozen(kw_only=True, eq=False)
class BatchFormer:
    """Forms the batches of the rl phase."""

    run: Run
    dispatcher: Dispatcher
    credit: CreditState
    progress: Progress
    ledger: FactSink
    costs: Costs
    """By which batches are packed: the trainer's."""

    async def form(self, batches: BoundedQueue[PreparedBatch]) -> None:
        """Every batch up to the last step, then close `batches`."""
        while self.progress.formed < self.progress.steps:
            await batches.room()
            await batches.put(await self.prepare(await self.dispatcher.take()))
        batches.close()

    async def prepare(self, groups: Sequence[Group]) -> PreparedBatch:
        """The next batch, of groups that were just taken; which version it trains is settled at once."""
        version = self.progress.formed
        self.progress.formed += 1
        self.progress.change.notify()
        self.credit.forming(version, self.progress.trained)
        scored = await self._score(groups)
        samples = [s for group in scored for s in group.samples]
        batch = await pack_batch(samples, self.run, self.costs, version, phase="rl")
        group_ids = tuple(group.group_id for group in groups)
        self.ledger.record(facts.Formed(feed="rl", batch=batch, group_ids=group_ids, groups=scored))
        return PreparedBatch(
            batch=batch,
            learning_rate=self._learning_rate(batch.step),
            publish=True,
            feed=self.dispatcher.feed,
            issues=group_ids,
            groups=scored,
        )

    async def _score(self, groups: Sequence[Group]) -> tuple[Scored, ...]:
        """Group by group: thousands of rollouts take long enough to let other loops run in between."""
        scored = []
        for group in groups:
            scored.append(score(group, self.credit.advantage))
            await asyncio.sleep(0)
        return tuple(scored)

    def _learning_rate(self, step: int) -> float:
        run = self.run
        return learning_rate(run.schedule, run.optimizer.learning_rate, step - run.warmup.steps, run.run.steps)


async def pack_batch(
    samples: Sequence[Sample], run: Run, costs: Costs, version: int, *, phase: Literal["warmup", "rl"]
) -> Batch:
    """The batch that trains `version`, packed for the run's trainer; off the event loop when it is large."""
    call = functools.partial(
        pack,
        samples,
        step=version + 1,
        version=version,
        phase=phase,
        ranks=run.trainer.ranks,
        context=run.trainer.context,
        costs=costs,
        micro_batch_tokens=run.trainer.micro_batch_tokens,
    )
    large = sum(len(sample) for sample in samples) > _PACKED_IN_PLACE
    return await asyncio.to_thread(call) if large else call()
