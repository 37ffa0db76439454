"""What the controller tells the ledger, one class per fact, in the order in which a run meets them.

Facts hold references to groups and batches, never copies: making one costs the event loop microseconds, and what it
takes to write it down (run lengths, hashes, SQL) is done in the ledger's thread. Nothing they refer to may change
afterwards, which holds for everything in `prl.types`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeAlias

import attrs

from prl.dispatch.feed import Issue
from prl.providers import EngineLoad
from prl.score.credit import Scored
from prl.types import Batch, Group, Manifest, Sample

FeedName: TypeAlias = Literal["rl", "warmup"]
"""The phase whose tasks a feed issues; group ids count from 0 in each."""


@attrs.frozen
class Started:
    """The controller is up; nothing else is known yet."""


@attrs.frozen(kw_only=True)
class Continued:
    """Everyone has said Hello: the run goes on from `step`, and what came after it before is undone."""

    step: int
    source: str
    """The checkpoint it was read from; empty for a fresh start."""
    chain: str
    """Of version `step`, as the checkpoint has it; empty for a fresh start."""
    max_staleness: int | None
    """The bound that the scheduler's config declares, if it has such a field."""
    groups_per_step: int
    group_size: int
    samples_per_step: int
    feeds: Mapping[FeedName, Mapping[str, Any]]
    """`Feed.state_dict()` of each feed."""
    state: Mapping[str, Any] = attrs.field(factory=dict)
    """`ControllerState.state_dict()`, for the event log."""


@attrs.frozen
class Loaded:
    """The trainer published the weights that it starts from."""

    manifest: Manifest


@attrs.frozen(kw_only=True)
class Issued:
    """A task is on its way."""

    feed: FeedName
    issue: Issue
    restored: bool = False
    """Its group is finished: it came with the checkpoint, and `Arrived` is next."""


@attrs.frozen(kw_only=True)
class Placed:
    """A group runs on an engine, through an environment worker."""

    group_id: int
    engine: int
    worker: str
    version: int
    """Newest version served at that moment."""


@attrs.frozen(kw_only=True)
class Arrived:
    """A group came back; one that is not admitted is `Dropped` next."""

    group: Group
    admitted: bool
    restored: bool = False
    """It came with the checkpoint."""


@attrs.frozen(kw_only=True)
class Dropped:
    """A group in flight, just arrived or ready will not be trained on; `again`: its task is issued once more."""

    group_id: int
    reason: str
    again: bool
    cut: bool = False
    """In flight, because the scheduler said so when a version was served."""


@attrs.frozen
class Taken:
    """These groups left the ready ones at this moment, to be the next batch; told for the event log alone."""

    group_ids: tuple[int, ...]


@attrs.frozen(kw_only=True)
class Demonstrated:
    """The next batch of the warm-up, before it is packed; told for the event log alone."""

    group_ids: tuple[int, ...]
    samples: tuple[Sample, ...]


@attrs.frozen(kw_only=True)
class Formed:
    """A batch, and what it is made of: groups in the rl phase, single tasks in the warm-up."""

    feed: FeedName
    batch: Batch
    group_ids: tuple[int, ...]
    groups: tuple[Scored, ...]


@attrs.frozen(kw_only=True)
class Handed:
    """The trainer begins a step."""

    step: int


@attrs.frozen(kw_only=True)
class Trained:
    """Every rank has done the step: its groups are trained, and version `step` exists."""

    step: int
    manifest: Manifest | None
    """Of the version, if it was published."""


@attrs.frozen(kw_only=True)
class Served:
    """Every serving engine has committed the version, so long after it was announced."""

    version: int
    seconds: float


@attrs.frozen(kw_only=True)
class Loads:
    """What the scheduler was told of the engines; `at` on its clock."""

    at: float
    loads: tuple[EngineLoad, ...]


@attrs.frozen(kw_only=True)
class EngineChanged:
    """An engine joined, left (`detail` says why) or committed a version."""

    engine: int
    event: Literal["joined", "left", "committed"]
    version: int
    detail: str = ""


@attrs.frozen
class Cut:
    """The controller's part of a checkpoint of `step` is as it is now; told for the event log alone."""

    step: int


@attrs.frozen(kw_only=True)
class Saved:
    """A checkpoint is complete on disk."""

    step: int
    path: str


@attrs.frozen(kw_only=True)
class Failed:
    """Something broke through no fault of the policy."""

    who: str
    where: str
    sentence: str
    done: str
    """What was done about it."""


@attrs.frozen(kw_only=True)
class Ended:
    """The controller ends: `finished`, `stopped` or `failed` with its sentence."""

    status: str
    error: str


Fact: TypeAlias = (
    Started
    | Continued
    | Loaded
    | Issued
    | Placed
    | Arrived
    | Dropped
    | Taken
    | Demonstrated
    | Formed
    | Handed
    | Trained
    | Loads
    | Served
    | EngineChanged
    | Cut
    | Saved
    | Failed
    | Ended
)


class FactSink(Protocol):
    """Whoever is told: the ledger of a run, and what compares a replay with one."""

    def record(self, fact: Fact) -> None: ...

    async def room(self) -> None:
        """Wait while too much of what was told is not written."""
