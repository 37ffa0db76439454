"""What is generated, and when: environments and rollout schedulers. See `prl.providers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

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
    """True: never blocks an event loop for more than a millisecond, so it runs inside the controller."""


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
    """`(config, groups_per_step, clock) -> RolloutScheduler`; clock is `Callable[[], float]` in seconds."""


@attrs.frozen(kw_only=True)
class Pipeline:
    """What the scheduler is shown before it decides."""

    version: int  # newest version the engines serve
    next_version: int  # version at which the next batch to be formed will be trained (>= version)
    ready: int  # admitted groups waiting to be packed
    running: int  # groups in flight


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
