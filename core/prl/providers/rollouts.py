"""What is generated, and when: environments and rollout schedulers. See `prl.providers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import attrs

from prl.providers.provider import Provider, Ref

if TYPE_CHECKING:
    from prl.rollout.conversation import Conversation
    from prl.types import Group, Message, Split, Task


@attrs.frozen(kw_only=True)
class Environment(Provider):
    """Tasks, how one task becomes a conversation with the policy, and what it was worth."""

    build: Ref
    """`(config, seed) -> Env`; seed is the run's."""
    cheap: bool = False
    """True: never blocks an event loop for more than a millisecond, so it runs inside the controller unless a
    config says otherwise (`runs_in`)."""


@attrs.frozen(kw_only=True)
class Score:
    """What a conversation was worth."""

    reward: float
    metrics: Mapping[str, float] = attrs.field(factory=dict)


class Env(Protocol):
    """Built once in each environment process. Tasks are indexed so that a split can be resumed and never overlaps."""

    def size(self, split: Split) -> int:
        """Number of distinct tasks; no task of `eval` is in `train`."""

    def task(self, split: Split, index: int) -> Task:
        """The same task for the same arguments, in every process."""

    async def rollout(self, task: Task, conversation: Conversation) -> None:
        """Hold the conversation: `reply = await conversation.ask(messages)`, as often as the task wants."""

    async def score(self, task: Task, conversations: Sequence[Conversation]) -> Sequence[Score]:
        """Score the finished siblings together, in order."""

    def demonstration(self, task: Task) -> Sequence[Message] | None:
        """A solved conversation for the supervised warm-up, or None."""

    async def aclose(self) -> None: ...


@attrs.frozen(kw_only=True)
class Scheduler(Provider):
    """Rollout scheduler: what may start, what is fresh enough, what to cut. (Slurm is a launcher.)"""

    build: Ref
    """`(config, groups_per_step, clock) -> RolloutScheduler`; clock is `Callable[[], float]` in seconds.

    A field of the config that is a scheduler's section itself is built first, and given under the field's name.
    """


@attrs.frozen(kw_only=True)
class Pipeline:
    """What the scheduler is shown before it decides."""

    version: int  # newest version the engines serve
    next_version: int  # version at which the next batch to be formed will be trained (>= version)
    ready: int  # admitted groups waiting to be packed
    running: int  # groups in flight
    arrived: int = 0  # groups that came back from their flight since the launch began
    group_size: int = 1  # rollouts of a group


@attrs.frozen(kw_only=True)
class EngineLoad:
    """What a serving engine said of itself; sequences and tokens are those it computes for anybody."""

    engine: int  # index
    running: float  # sequences that decode
    waiting: float  # sequences that wait for room
    kv_usage: float  # share of the room for keys and values that is taken, 0 to 1
    preemptions: float  # sequences that lost their room to others, since the engine started
    sequences: float  # most that decode at once
    kv_tokens: float  # room for keys and values, in tokens
    length: float  # most tokens of a sequence


@attrs.frozen(kw_only=True)
class InFlight:
    """A group that is being generated."""

    group_id: int
    started_version: int
    started_at: float  # on the scheduler's clock


@attrs.frozen(kw_only=True)
class Drop:
    """A decision against a group, with the reason the record will carry."""

    group_id: int
    reason: str
    retry: bool = True
    """Issue the task again; False gives it up."""


class RolloutScheduler(Protocol):
    """A pure state machine at group granularity; called by the controller only."""

    def capacity(self, pipeline: Pipeline) -> int:
        """How many groups may start now."""

    def admit(self, group: Group, version: int) -> Drop | None:
        """May this group be trained at `version`? Asked when it arrives and again when a batch is formed."""

    def select(self, ready: Sequence[int], outstanding: Sequence[int], count: int) -> Sequence[int]:
        """Which `count` of the ready groups form the next batch; empty: wait.

        `ready` (at least `count`) and `outstanding` (issued and not finished) are group ids, ascending.
        """

    def on_publish(self, version: int, in_flight: Sequence[InFlight]) -> Sequence[Drop]:
        """New weights are served: which groups in flight can no longer be used?"""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class LoadAwareScheduler(RolloutScheduler, Protocol):
    """A scheduler that wants to know how the engines do."""

    @property
    def poll_seconds(self) -> float:
        """How often it is told; the first time before anything starts."""

    def observe(
        self, at: float, loads: Sequence[EngineLoad], pipeline: Pipeline, in_flight: Sequence[InFlight]
    ) -> Sequence[Drop]:
        """What the serving engines said, those that answered; `at` is on the scheduler's clock. Which groups to cut?"""

    def gauges(self) -> Mapping[str, float]:
        """Metrics of the steps: name -> value of now."""
