"""Held-out tasks, rolled out on the engines that also serve training, while training goes on.

    request(step) -> once `step` is served: every task once -> one line of metrics

At most a quarter as many rollouts run at once as a training step has, so that evaluation slows training a little and
never stops it. A version that is published meanwhile does not interrupt it: `eval/version` is the oldest version that
sampled any of its tokens. A task is tried again when its rollout is lost and left out, counted, when it always is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

import attrs

from prl.compose.config import Run
from prl.dispatch.buffer import BoundedQueue
from prl.dispatch.change import Change
from prl.dispatch.feed import Issue
from prl.dispatch.metrics import accuracy
from prl.dispatch.permutation import sampling_seed
from prl.dispatch.placement import GroupLostError, Placement
from prl.dispatch.progress import Progress
from prl.ledger import facts
from prl.ledger.writer import Ledger
from prl.types import Rollout, Sampling, TaskRef

log = logging.getLogger(__name__)

Results = dict[int, Rollout | None]
"""Number of a task -> its rollout, None when it was lost."""


@attrs.frozen(kw_only=True)
class EvaluationOutcome:
    """One evaluation; `metrics` are named as in docs/architecture.md."""

    step: int
    metrics: Mapping[str, float]


class Evaluator:
    """Evaluates on request; `run` is its loop during the rl phase."""

    def __init__(
        self,
        *,
        run: Run,
        tasks: Sequence[TaskRef],
        placement: Placement,
        progress: Progress,
        ledger: Ledger,
        report: Callable[[EvaluationOutcome], Awaitable[None]],
    ) -> None:
        self._run = run
        self._tasks = tuple(tasks)
        self._placement = placement
        self._progress = progress
        self._ledger = ledger
        self._report = report
        self._requests: BoundedQueue[int] = BoundedQueue("evaluations", 1)
        self._busy = False
        self._change = Change()
        self.newest = -1
        """Step of the evaluation that began last."""

    @property
    def wanted(self) -> bool:
        """Whether the run evaluates at all."""
        return self._run.evaluation.every > 0

    def due(self, step: int) -> bool:
        """Whether the version that `step` yields is to be evaluated: the first of the rl phase, and every so many."""
        since, every = step - self._run.warmup.steps, self._run.evaluation.every
        return every > 0 and since >= 0 and since % every == 0

    def request(self, step: int) -> None:
        """Evaluate the version that `step` yields, if that is due and no other evaluation waits already."""
        if self.due(step) and not self._requests.offer(step):
            log.warning("evaluation after step %d is left out: the one before has not begun yet", step)

    async def run(self) -> None:
        while (step := await self._requests.get()) is not None:
            self._busy = True
            await self._progress.until_served(step)
            await self.evaluate(step)
            self._busy = False
            self._change.notify()

    async def idle(self) -> None:
        """Wait until every evaluation that was requested is done."""
        await self._change.until(lambda: not self._busy and not self._requests.statistics().waiting)

    async def evaluate(self, step: int) -> None:
        """Roll out every task with what the engines serve now, and report."""
        self.newest = step
        results: Results = {}
        numbers = iter(range(len(self._tasks)))
        async with asyncio.TaskGroup() as lanes:
            for _ in range(self._lanes()):
                lanes.create_task(self._lane(numbers, results))
        await self._report(EvaluationOutcome(step=step, metrics=self._metrics(results)))

    def _lanes(self) -> int:
        rollouts = self._run.rollouts
        return max(1, rollouts.groups_per_step * rollouts.group_size // 4)

    async def _lane(self, numbers: Iterator[int], results: Results) -> None:
        for number in numbers:
            results[number] = await self._rollout(number)

    async def _rollout(self, number: int) -> Rollout | None:
        for attempt in range(self._run.rollouts.retries + 1):
            issue = Issue(group_id=-1 - number, task=self._tasks[number], attempt=attempt)
            try:
                group = await self._placement.run(
                    issue, size=1, sampling=self._sampling(issue), version=self._progress.served
                )
            except GroupLostError as error:
                self._lost(issue, error)
            else:
                return group.rollouts[0]
        return None

    def _lost(self, issue: Issue, error: GroupLostError) -> None:
        log.warning("evaluation: %s", error)
        done = "tried again" if issue.attempt < self._run.rollouts.retries else "left out of the evaluation"
        who = f"held-out {issue.task.environment} task {issue.task.index}"
        self._ledger.record(facts.Failed(who=who, where=error.reason, sentence=str(error), done=done))

    def _sampling(self, issue: Issue) -> Sampling:
        return Sampling(
            temperature=self._run.evaluation.temperature,
            max_tokens=self._run.rollouts.max_tokens,
            min_tokens=self._run.rollouts.min_tokens,
            seed=sampling_seed(self._run.run.seed, issue.group_id, issue.attempt),
        )

    def _metrics(self, results: Results) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name in dict.fromkeys(task.environment for task in self._tasks):
            rollouts = [results[n] for n, task in enumerate(self._tasks) if task.environment == name]
            metrics |= environment_metrics(name, rollouts)
        versions = [r.oldest_version for r in results.values() if r is not None and r.sampled_count]
        return {**metrics, "eval/version": min(versions, default=self._progress.served)}


def environment_metrics(name: str, rollouts: Sequence[Rollout | None]) -> dict[str, float]:
    """Means over the rollouts that were not lost, and how many were."""
    kept = [rollout for rollout in rollouts if rollout is not None]
    metrics: dict[str, float] = {}
    if kept:
        metrics[f"eval/{name}/reward"] = sum(rollout.reward for rollout in kept) / len(kept)
        metrics |= accuracy(kept, f"eval/{name}/accuracy")
    if len(kept) < len(rollouts):
        metrics[f"eval/{name}/lost"] = len(rollouts) - len(kept)
    return metrics
