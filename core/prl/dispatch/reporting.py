"""What came of a step or an evaluation becomes a line of metrics, and everyone is told.

    reports -> metrics.jsonl, rollouts.jsonl, state.json, prl_step_end, trackers

A loop of its own with a short queue, so that the trainer's next step starts before the last one is written down. Waits
for reports, and for the disk; ends when the queue is closed and everything is written.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from prl.dispatch import metrics
from prl.dispatch.batches import PreparedBatch
from prl.dispatch.buffer import BoundedQueue
from prl.dispatch.evaluation import EvaluationOutcome
from prl.dispatch.events import LifecycleHooks, Trackers
from prl.dispatch.progress import Progress
from prl.dispatch.record import Record, StateFile
from prl.messages import StepDone

_BACKLOG = 4
_PACE_STEPS = 20  # the time left is estimated from so many steps


@attrs.frozen(kw_only=True, eq=False)
class StepOutcome:
    """A step that is done."""

    prepared: PreparedBatch
    reports: Sequence[StepDone]
    seconds: float
    """Since the end of the step before."""


@attrs.define(kw_only=True, eq=False)
class Reporter:
    """Turns outcomes into lines; `gauges` reads what other loops know at that moment (queues, drops, idle engines)."""

    record: Record
    state: StateFile
    hooks: LifecycleHooks
    trackers: Trackers
    progress: Progress
    keep_rollouts: bool
    gauges: Callable[[], Mapping[str, float]]
    queue: BoundedQueue[StepOutcome | EvaluationOutcome] = attrs.field(init=False)
    _pace: deque[float] = attrs.field(init=False)
    _last_step: dict[str, Any] = attrs.field(factory=dict, init=False)
    _last_evaluation: dict[str, Any] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self.queue = BoundedQueue("reports", _BACKLOG)
        self._pace = deque(maxlen=_PACE_STEPS)

    async def run(self) -> None:
        while (outcome := await self.queue.get()) is not None:
            if isinstance(outcome, StepOutcome):
                await self._step(outcome)
            else:
                await self._tell(outcome.step, {**self._head(outcome.step, "eval"), **outcome.metrics})

    async def _step(self, outcome: StepOutcome) -> None:
        batch, groups = outcome.prepared.batch, outcome.prepared.groups
        measured = await asyncio.to_thread(_measure, outcome)  # milliseconds, for a batch of millions of tokens
        line = {**self._head(batch.step, batch.phase), **measured, **self._pace_metrics(outcome), **self.gauges()}
        await self._tell(batch.step, line)
        self.hooks.call("prl_step_end", step=batch.step, version=batch.step, metrics=line)
        if groups:
            self.trackers.groups(batch.step, [scored.group for scored in groups])
        if groups and self.keep_rollouts:
            await asyncio.to_thread(self.record.rollouts, batch.step, groups)

    def _head(self, step: int, phase: str) -> dict[str, Any]:
        return {"step": step, "version": step, "time": time.time(), "phase": phase}

    def _pace_metrics(self, outcome: StepOutcome) -> dict[str, float]:
        """From the pace of the last rl steps; a warm-up step says nothing about them."""
        batch = outcome.prepared.batch
        if batch.phase != "rl":
            return {}
        self._pace.append(outcome.seconds)
        return {"progress/seconds_left": (self.progress.steps - batch.step) * sum(self._pace) / len(self._pace)}

    async def _tell(self, step: int, line: Mapping[str, Any]) -> None:
        await asyncio.to_thread(self.record.metrics, line)
        if line["phase"] == "eval":
            self._last_evaluation = {name: value for name, value in line.items() if name.startswith("eval/")}
        else:
            self._last_step = dict(line)
        self.state.update(
            metrics={**self._last_step, **self._last_evaluation},
            step=self.progress.trained,
            version=self.progress.trained,
        )
        self.trackers.log(step, line)


def _measure(outcome: StepOutcome) -> dict[str, float]:
    """Everything a step says about itself."""
    batch, seconds = outcome.prepared.batch, outcome.seconds
    tokens = metrics.token_metrics(batch)
    return {
        **metrics.trainer_metrics(batch, outcome.reports),
        **metrics.group_metrics(outcome.prepared.groups),
        **tokens,
        "tokens/per_second": tokens["tokens/sampled"] / seconds if seconds > 0 else 0.0,
        "idle/trainer": metrics.trainer_idle(outcome.reports, seconds),
        "time/step": seconds,
    }
