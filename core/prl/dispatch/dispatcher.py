"""Keeps rollouts in flight: starts groups while the scheduler sees capacity, and decides what becomes of each.

    feed -> placement -> admit -> group buffer           a lost, cut or refused group goes back to the feed

`run` waits for something to change the scheduler's mind: a group that ends, a batch that is formed, a version that is
served, an engine that joins. One child task per group in flight. Knows nothing of credit, packing or metrics: the loop
that forms batches calls `take`, publication calls `published`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

import attrs

from prl.compose.config import RolloutSection
from prl.dispatch.buffer import GroupBuffer
from prl.dispatch.engines import EnginePool
from prl.dispatch.feed import Feed, Issue
from prl.dispatch.permutation import sampling_seed
from prl.dispatch.placement import GroupLostError, Placement
from prl.dispatch.progress import Progress
from prl.errors import RunError
from prl.ledger import facts
from prl.ledger.facts import FactSink
from prl.providers import Drop, EngineLoad, InFlight, LoadAwareScheduler, Pipeline, RolloutScheduler
from prl.types import Carried, Group, Sampling

log = logging.getLogger(__name__)

_MOST_STEPS_AHEAD = 64  # bounds what is in flight and ready, whatever a scheduler answers
_JUDGED_STEPS = 16  # a burst of losses, as when an engine dies, is small beside what so many steps need


@attrs.define(kw_only=True, eq=False)
class Dispatcher:
    """The training half of generation; evaluation has its own (`prl.dispatch.evaluation`)."""

    feed: Feed
    scheduler: RolloutScheduler
    placement: Placement
    engines: EnginePool
    progress: Progress
    ledger: FactSink
    rollouts: RolloutSection
    most_lost: float
    """Share of the last groups that may be lost to failures."""
    seed: int
    clock: Callable[[], float]
    on_group: Callable[[Group, int], None]
    """Told of every group that arrives, with the version served then."""
    buffer: GroupBuffer = attrs.field(init=False)
    _dropped: Counter[str] = attrs.field(factory=Counter, init=False)
    _in_flight: dict[int, InFlight] = attrs.field(factory=dict, init=False)
    _cuts: dict[int, Drop] = attrs.field(factory=dict, init=False)
    _taken: dict[int, Group] = attrs.field(factory=dict, init=False)
    """Groups of the batches that were formed, until they are trained."""
    _carried: dict[tuple[int, int], Carried] = attrs.field(factory=dict, init=False)
    """What the checkpoint has of groups that were in flight, by id and attempt, until they are in flight again."""
    _arrived: int = attrs.field(default=0, init=False)
    _outcomes: deque[bool] = attrs.field(init=False)
    """Of the last groups: whether each was lost to a failure."""

    def __attrs_post_init__(self) -> None:
        self._outcomes = deque(maxlen=_JUDGED_STEPS * self.rollouts.groups_per_step)
        self.buffer = GroupBuffer(_MOST_STEPS_AHEAD * self.rollouts.groups_per_step)

    # --- starting groups ----------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Until cancelled. RunError when too large a share of the groups is lost to failures."""
        async with asyncio.TaskGroup() as groups:
            while True:
                await self.ledger.room()
                await self.progress.change.until(lambda: bool(self.engines.sampling) and self.capacity() > 0)
                groups.create_task(self._roll(self.start()))
                await asyncio.sleep(0)  # a step's groups may start at once, and must not hold up the other loops

    def capacity(self) -> int:
        """How many groups may start now, where an engine serves."""
        pipeline = self.pipeline
        steps = min(self.progress.steps - self.progress.formed, _MOST_STEPS_AHEAD)
        left = steps * self.rollouts.groups_per_step - pipeline.ready - pipeline.running
        return min(self.scheduler.capacity(pipeline), left)

    @property
    def pipeline(self) -> Pipeline:
        return Pipeline(
            version=self.progress.served,
            next_version=self.progress.formed,
            ready=len(self.buffer),
            running=len(self._in_flight),
            arrived=self._arrived,
            group_size=self.rollouts.group_size,
        )

    def start(self) -> Issue:
        """The next task is in flight from now on."""
        issue = self.feed.next()
        self.ledger.record(facts.Issued(feed="rl", issue=issue))
        self._in_flight[issue.group_id] = InFlight(
            group_id=issue.group_id, started_version=self.progress.served, started_at=self.clock()
        )
        return issue

    async def _roll(self, issue: Issue) -> None:
        """One attempt at a group, until it is in the buffer or given back."""
        try:
            group = await self.placement.run(
                issue,
                size=self.rollouts.group_size,
                sampling=self._sampling(issue),
                version=self.progress.served,
                carried=self._take_carried(issue),
            )
        except GroupLostError as error:
            self.lost(issue, error)
        else:
            await self.buffer.room()
            self.arrived(group)

    def _take_carried(self, issue: Issue) -> Carried | None:
        """What was sampled of this attempt before the run was resumed, unless it is too old to be trained."""
        carried = self._carried.pop((issue.group_id, issue.attempt), None)
        if carried is None:
            return None
        begun = Group(
            group_id=issue.group_id,
            task=issue.task,
            attempt=issue.attempt,
            started_version=carried.oldest_version,
            rollouts=(),
        )
        return carried if self.scheduler.admit(begun, self.progress.formed) is None else None

    def _sampling(self, issue: Issue) -> Sampling:
        return Sampling(
            temperature=self.rollouts.temperature,
            max_tokens=self.rollouts.max_tokens,
            min_tokens=self.rollouts.min_tokens,
            seed=sampling_seed(self.seed, issue.group_id, issue.attempt),
        )

    # --- what becomes of them -----------------------------------------------------------------------------------------
    def arrived(self, group: Group) -> None:
        """A group came back from its flight: it is ready, or goes back to the feed."""
        self._arrived += 1
        self._outcomes.append(False)
        self.on_group(group, self.progress.served)
        drop = self.scheduler.admit(group, self.progress.formed)
        self.ledger.record(facts.Arrived(group=group, admitted=drop is None))
        if drop is None:
            self.buffer.add(group)
        self._landed(group.group_id, drop)

    def lost(self, issue: Issue, error: GroupLostError) -> None:
        """An attempt came to nothing; RunError when too many do, one after the other."""
        self._landed(issue.group_id, self._lost(issue, error))

    def _landed(self, group_id: int, drop: Drop | None) -> None:
        del self._in_flight[group_id]
        if drop is not None:
            self._drop(drop, cut=group_id in self._cuts)
        self._cuts.pop(group_id, None)
        self.buffer.reconsider()
        self.progress.change.notify()

    def _lost(self, issue: Issue, error: GroupLostError) -> Drop:
        cut = self._cuts.get(issue.group_id)
        if cut is not None:
            return cut
        tries = f"attempt {issue.attempt + 1} of {self.rollouts.retries + 1}"
        log.warning("%s; %s", error, tries)
        who = f"group {issue.group_id}"
        self.ledger.record(facts.Failed(who=who, where=error.reason, sentence=str(error), done=f"dropped, {tries}"))
        if not error.cut:
            self._outcomes.append(True)
            self._guard(error)
        return Drop(group_id=issue.group_id, reason=error.reason)

    def _guard(self, error: GroupLostError) -> None:
        """A run most of whose groups fail would train on what is left, which is no fair sample of its tasks."""
        lost, seen = sum(self._outcomes), len(self._outcomes)
        if seen == self._outcomes.maxlen and lost > self.most_lost * seen:
            raise RunError(
                f"{lost} of the last {seen} groups were lost to failures, more than failures.share = "
                f"{self.most_lost:g} allows; the last one because: {error}"
            )

    def _drop(self, drop: Drop, *, cut: bool = False) -> None:
        self._dropped[drop.reason] += 1
        issue = self.feed.outstanding(drop.group_id)
        again = drop.retry and self.feed.retry(issue)
        self.ledger.record(facts.Dropped(group_id=drop.group_id, reason=drop.reason, again=again, cut=cut))
        if not drop.retry:
            self.feed.finish([drop.group_id])
        elif not again:
            self._dropped["given_up"] += 1
            log.warning("%s task %d is given up", issue.task.environment, issue.task.index)
        self.progress.change.notify()

    def _admit(self, group: Group) -> bool:
        drop = self.scheduler.admit(group, self.progress.formed)
        if drop is not None:
            self._drop(drop)
        return drop is None

    # --- called by the other loops ------------------------------------------------------------------------------------
    async def take(self) -> list[Group]:
        """The groups of the next batch, in the order of their ids, all admissible at the version `progress.formed`."""
        while True:
            await self.buffer.until(self._select)
            if groups := self.take_now():
                return groups

    def take_now(self) -> list[Group]:
        """As `take`, without waiting: none when too few are ready and still admissible."""
        groups = self.buffer.take_now(self._select, self._admit)
        if groups:
            self.ledger.record(facts.Taken(tuple(group.group_id for group in groups)))
        still = {group_id: group for group_id, group in self._taken.items() if self.feed.holds(group_id)}
        self._taken = {**still, **{group.group_id: group for group in groups}}
        return groups

    def _select(self, ready: list[int]) -> Sequence[int]:
        count = self.rollouts.groups_per_step
        if len(ready) < count:
            return ()
        outstanding = sorted({*self._in_flight, *self.feed.waiting} - set(ready))
        return self.scheduler.select(ready, outstanding, count)

    def published(self, version: int) -> None:
        """Every engine serves `version`: cut what the scheduler no longer wants."""
        self._cut(self.scheduler.on_publish(version, list(self._in_flight.values())))

    def observed(self, at: float, loads: Sequence[EngineLoad]) -> None:
        """The engines said how they do: let a scheduler that wants to know change its mind."""
        if isinstance(self.scheduler, LoadAwareScheduler):
            wanted = [group for group in self._in_flight.values() if group.group_id not in self._cuts]
            self._cut(self.scheduler.observe(at, loads, self.pipeline, wanted))
            self.progress.change.notify()

    def _cut(self, drops: Iterable[Drop]) -> None:
        for drop in drops:
            self._cuts.setdefault(drop.group_id, drop)
            self.placement.cut(drop.group_id, drop.reason)

    def pending(self) -> list[Group]:
        """Finished groups that no step was trained on yet: the ready ones, and those of batches formed ahead."""
        taken = [group for group_id, group in self._taken.items() if self.feed.holds(group_id)]
        return sorted((*taken, *self.buffer.groups), key=lambda group: group.group_id)

    def restore(self, groups: Iterable[Group], carried: Iterable[Carried] = ()) -> None:
        """Take up what was `pending` at a checkpoint; what is not fresh enough stays with the feed, to be redone.

        `carried` is what it has of groups that were in flight.
        """
        self._carried = {(entry.group_id, entry.attempt): entry for entry in carried}
        for group in groups:
            if self.scheduler.admit(group, self.progress.formed) is None:
                self.ledger.record(facts.Issued(feed="rl", issue=self.feed.reclaim(group.group_id), restored=True))
                self.ledger.record(facts.Arrived(group=group, admitted=True, restored=True))
                self.buffer.add(group)

    def take_dropped(self) -> Counter[str]:
        """Groups dropped since the last call, by reason; `given_up` counts those that had no retry left."""
        dropped, self._dropped = self._dropped, Counter()
        return dropped

    @property
    def running(self) -> int:
        return len(self._in_flight)

    def runs(self, group_id: int) -> bool:
        """Whether the group is in flight."""
        return group_id in self._in_flight

    def cuts(self, group_id: int) -> bool:
        """Whether the scheduler no longer wants the group, which is in flight."""
        return group_id in self._cuts
