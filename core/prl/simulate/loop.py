"""The controller's loop in discrete events: the very scheduler and feed of a run, everything else modelled.

    capacity > 0 ──► feed.next ──► engine ──► environment ──► admit ──► ready ──► select ──► trainer ──► publish
         ▲                  cut or lost: feed.retry ◄───────────┘  └─ refused ─┐                            │
         └──────────────────────────────────────────◄──────────────────────────┴───── on_publish ◄──────────┘

It mirrors `prl.dispatch`: groups start one by one while the scheduler sees capacity (and the run has steps left), on
the engine with the fewest rollouts; a group that arrives is admitted against the next version to be formed; a batch is
formed as soon as one may wait for the trainer, every ready group being asked for admission again; the newest version
is published as soon as the one before is served, and `on_publish` cuts. A group of which fewer than two rollouts are
left, or that takes longer than `rollouts.timeout`, is lost and tried again, `rollouts.retries` times.

Left out: prompts and prefill; turns (environment time comes after a rollout's last token, and holds no slot);
evaluation and warm-up; engines that die, lag or leave; the controller's own time and the pause of a commit; rewards and
advantages. A group shown to the scheduler has no per-token columns, only their counts and versions.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import attrs

from prl.compose.config import RolloutSection
from prl.dispatch.feed import Feed, Issue, Source
from prl.errors import RunError
from prl.providers import Drop, EngineLoad, InFlight, LoadAwareScheduler, Pipeline, RolloutScheduler
from prl.simulate.cluster import Cluster
from prl.simulate.engine import Decoding, SimulatedEngine
from prl.simulate.figures import Figures
from prl.simulate.groups import SimulatedGroup, SimulatedRollout, simulated
from prl.simulate.tally import Tally
from prl.simulate.workload import Workload

Clock: TypeAlias = Callable[[], float]
_MOST_BATCHES_WAITING = 1  # formed ahead of the trainer
_MOST_STEPS_LOST = 64  # that many steps' groups dropped without a batch: it will not get better
_TASKS = 1 << 20  # of the one environment; a power of four is what the feed's permutation is fastest with


@attrs.define(eq=False, kw_only=True)
class _Attempt:
    """One try at a group, while it lasts."""

    issue: Issue
    in_flight: InFlight
    engine: SimulatedEngine
    sequences: list[Decoding]
    decoding: int
    """Sequences that have not ended."""
    arrives: float
    """When the last environment of those that ended is done."""
    rollouts: list[SimulatedRollout] = attrs.field(factory=list)
    live: bool = True


class Simulation:
    """A run of `steps` optimizer steps from `state` (by default from the start).

    Example:
        >>> simulation = Simulation(build, rollouts=rollouts, workload=workload, cluster=cluster, steps=100, seed=0)
        >>> simulation.run()
        >>> simulation.figures().tokens_per_second
        11840.3
    """

    def __init__(
        self,
        build: Callable[[Clock], RolloutScheduler],
        *,
        rollouts: RolloutSection,
        workload: Workload,
        cluster: Cluster,
        steps: int,
        seed: int = 0,
        tally: Tally | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.scheduler = build(lambda: self.now)
        self.feed = Feed(
            [Source(environment="simulated", weight=1.0, size=_TASKS)], seed=seed, retries=rollouts.retries
        )
        self.tally = tally or Tally()
        self.now = 0.0
        self._again: set[int] = set()
        self.trained = self._restore(state) if state else 0
        self.served = self.formed = self.trained
        self.ready: dict[int, SimulatedGroup] = {}
        self._steps = self.trained + steps
        self._rollouts, self._workload, self._cluster, self._seed = rollouts, workload, cluster, seed
        self._engines = [SimulatedEngine(cluster, version=self.served) for _ in range(cluster.engines)]
        self._running: dict[int, _Attempt] = {}
        self._batches: deque[list[SimulatedGroup]] = deque()
        self._training: list[SimulatedGroup] = []
        self._publishing = False
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._announced = 0
        self._came = 0
        self._dropped_in_a_row = 0
        if isinstance(self.scheduler, LoadAwareScheduler):
            self._at(0.0, self._observe, self.scheduler)

    # --- running ------------------------------------------------------------------------------------------------------
    def run(self, *, until: int | None = None) -> None:
        """Go on until version `until` is trained (the last, by default); RunError when that never happens."""
        goal = self._steps if until is None else min(until, self._steps)
        self._settle()
        while self.trained < goal:
            if not self._events:
                raise RunError(self._stuck("nothing is running and the scheduler starts nothing"))
            self.now, _, handle, arguments = heapq.heappop(self._events)
            handle(*arguments)

    def figures(self) -> Figures:
        """What came of it so far; at least one step has been made."""
        for engine in self._engines:
            engine.settle(self.now)
        return self.tally.figures(self.now, self._engines)

    def state_dict(self) -> dict[str, Any]:
        """A consistent cut, JSON-ready: what is not trained by now is issued again by who starts from it."""
        return {
            "version": self.trained,
            "feed": self.feed.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def _restore(self, state: Mapping[str, Any]) -> int:
        self.feed.load_state_dict(state["feed"])
        self.scheduler.load_state_dict(state["scheduler"])
        self._again = {issue["group_id"] for issue in state["feed"]["outstanding"]}
        version: int = state["version"]
        return version

    @property
    def outstanding(self) -> list[int]:
        """Groups that are issued and not finished: running, or waiting to be tried again."""
        return [*self._running, *self._again]

    def _at(self, time: float, handle: Callable[..., None], *arguments: Any) -> None:
        self._announced += 1
        heapq.heappush(self._events, (time, self._announced, handle, arguments))

    def _settle(self) -> None:
        """What the loops of the controller do when something changed."""
        self._form_batches()
        while self._capacity() > 0:
            self._start(self.feed.next())
        self.tally.queue(self.now, ready=len(self.ready), running=len(self._running), batches=len(self._batches))

    # --- starting groups ----------------------------------------------------------------------------------------------
    def _capacity(self) -> int:
        ready, running = len(self.ready), len(self._running)
        needed = (self._steps - self.formed) * self._rollouts.groups_per_step - ready - running
        return min(self.scheduler.capacity(self._pipeline()), needed)

    def _pipeline(self) -> Pipeline:
        return Pipeline(
            version=self.served,
            next_version=self.formed,
            ready=len(self.ready),
            running=len(self._running),
            arrived=self._came,
            group_size=self._rollouts.group_size,
        )

    def _observe(self, scheduler: LoadAwareScheduler) -> None:
        """What the engines say of themselves, as often as the scheduler wants it; they preempt nobody."""
        loads = [self._load(index, engine) for index, engine in enumerate(self._engines)]
        in_flight = [attempt.in_flight for attempt in self._running.values()]
        for drop in scheduler.observe(self.now, loads, self._pipeline(), in_flight):
            self._end(self._running[drop.group_id], drop)
        self._settle()
        if self._events:  # else nothing will ever happen again, which `run` reports
            self._at(self.now + scheduler.poll_seconds, self._observe, scheduler)

    def _load(self, index: int, engine: SimulatedEngine) -> EngineLoad:
        slots, length = self._cluster.slots, self._rollouts.sequence_length
        usage = engine.tokens(self.now) / (slots * length)
        self._announce_end(engine)
        return EngineLoad(
            engine=index,
            running=engine.running,
            waiting=len(engine.waiting),
            kv_usage=usage,
            preemptions=0,
            sequences=slots,
            kv_tokens=slots * length,
            length=length,
        )

    def _start(self, issue: Issue) -> None:
        plans = self._workload.group(self._seed, issue.group_id, issue.attempt, self._rollouts.group_size)
        engine = min(self._engines, key=lambda engine: engine.rollouts)
        attempt = _Attempt(
            issue=issue,
            in_flight=InFlight(group_id=issue.group_id, started_version=self.served, started_at=self.now),
            engine=engine,
            sequences=[Decoding(issue.group_id, plan) for plan in plans],
            decoding=len(plans),
            arrives=self.now,
        )
        self._again.discard(issue.group_id)
        self._running[issue.group_id] = attempt
        engine.rollouts += len(plans)
        engine.add(self.now, attempt.sequences)
        self._announce_end(engine)
        self._at(self.now + self._rollouts.timeout, self._timed_out, attempt)
        self.tally.start(issue, plans)

    def _announce_end(self, engine: SimulatedEngine) -> None:
        time = engine.next_end()
        if time is not None:
            self._at(time, self._decoded, engine, engine.ticket)

    # --- ending groups ------------------------------------------------------------------------------------------------
    def _decoded(self, engine: SimulatedEngine, ticket: int) -> None:
        """A sequence's last token, unless the engine changed since this was announced."""
        if ticket != engine.ticket:
            return
        for sequence in engine.end(self.now):
            attempt = self._running[sequence.group]
            attempt.decoding -= 1
            attempt.arrives = max(attempt.arrives, self.now + sequence.plan.latency)
            if sequence.plan.fails:
                self.tally.waste(sequence.plan.tokens)
            else:
                rollout_id = f"{sequence.group}.{len(attempt.rollouts)}"
                attempt.rollouts.append(simulated(rollout_id, engine.tokens_by_version(sequence)))
            if attempt.decoding == 0:
                self._at(attempt.arrives, self._arrived, attempt)
        self._announce_end(engine)

    def _arrived(self, attempt: _Attempt) -> None:
        if not attempt.live:
            return
        self._came += 1
        group_id, size = attempt.issue.group_id, len(attempt.sequences)
        if len(attempt.rollouts) < min(2, size):
            self._end(attempt, Drop(group_id=group_id, reason="environment"))
        else:
            group = SimulatedGroup(
                group_id=group_id,
                task=attempt.issue.task,
                attempt=attempt.issue.attempt,
                started_version=attempt.in_flight.started_version,
                rollouts=tuple(attempt.rollouts),
            )
            self._end(attempt, self.scheduler.admit(group, self.formed), group)
        self._settle()

    def _timed_out(self, attempt: _Attempt) -> None:
        if attempt.live:
            self._end(attempt, Drop(group_id=attempt.issue.group_id, reason="timeout"))
            self._settle()

    def _end(self, attempt: _Attempt, drop: Drop | None, group: SimulatedGroup | None = None) -> None:
        """An attempt is over: its group is ready, or dropped."""
        attempt.live = False
        del self._running[attempt.issue.group_id]
        attempt.engine.rollouts -= len(attempt.sequences)
        if drop is None and group is not None:
            self.ready[group.group_id] = group
            return
        assert drop is not None
        if attempt.decoding:
            self.tally.waste(attempt.engine.abort(self.now, attempt.sequences))
            self._announce_end(attempt.engine)
        self._drop(drop, attempt.rollouts)

    def _drop(self, drop: Drop, rollouts: Sequence[SimulatedRollout]) -> None:
        issue = self.feed.outstanding(drop.group_id)
        again = drop.retry and self.feed.retry(issue)
        if again:
            self._again.add(drop.group_id)
        elif not drop.retry:
            self.feed.finish([drop.group_id])
        self.tally.drop(drop, issue, given_up=not again)
        self.tally.waste(sum(rollout.sampled_count for rollout in rollouts))
        self._dropped_in_a_row += 1
        if self._dropped_in_a_row >= _MOST_STEPS_LOST * self._rollouts.groups_per_step:
            raise RunError(self._stuck(f"{self._dropped_in_a_row} groups were dropped, the last as {drop.reason!r}"))

    # --- training and publication -------------------------------------------------------------------------------------
    def _form_batches(self) -> None:
        while len(self._batches) < _MOST_BATCHES_WAITING and self.formed < self._steps:
            groups = self._next_batch()
            if not groups:
                return
            self._batches.append(groups)
            self.formed += 1
            self._dropped_in_a_row = 0
            self._train()

    def _next_batch(self) -> list[SimulatedGroup]:
        count = self._rollouts.groups_per_step
        if len(self.ready) < count:
            return []
        for group in list(self.ready.values()):
            drop = self.scheduler.admit(group, self.formed)
            if drop is not None:
                self._drop(drop, self.ready.pop(group.group_id).rollouts)
        if len(self.ready) < count:
            return []
        chosen = self.scheduler.select(sorted(self.ready), sorted(self.outstanding), count)
        return [self.ready.pop(group_id) for group_id in chosen]

    def _train(self) -> None:
        if self._training or not self._batches:
            return
        self._training = self._batches.popleft()
        seconds = self._cluster.train_step(sum(group.sampled_count for group in self._training))
        self._at(self.now + seconds, self._step_done, seconds)

    def _step_done(self, seconds: float) -> None:
        self.feed.finish([group.group_id for group in self._training])
        self.tally.train(self._training, version=self.trained, seconds=seconds)
        self.trained += 1
        self._training = []
        self._train()
        self._publish()
        self._settle()

    def _publish(self) -> None:
        if not self._publishing and self.trained > self.served:
            self._publishing = True
            self._at(self.now + self._cluster.publish, self._published, self.trained)

    def _published(self, version: int) -> None:
        self._publishing = False
        self.served = version
        for engine in self._engines:
            engine.commit(self.now, version)
            self._announce_end(engine)
        in_flight = [attempt.in_flight for attempt in self._running.values()]
        for drop in self.scheduler.on_publish(version, in_flight):
            self._end(self._running[drop.group_id], drop)
        self._publish()
        self._settle()

    def _stuck(self, why: str) -> str:
        return (
            f"the simulation stands still at {self.now:.1f} s, version {self.trained}: {why} ({len(self.ready)} groups "
            f"ready, {len(self._running)} running, {len(self._again)} to be tried again)"
        )
