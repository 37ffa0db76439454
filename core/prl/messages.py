"""What the controller and its workers say to each other, one attrs class per message.

Every worker (environment worker, engine, trainer rank) opens one connection to the controller's hub and says `Hello`.
Large columns travel as raw buffers beside a small header (see `wire.py`). A message of the wrong shape is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import attrs

from prl.checkpoint_dir import FileRecord
from prl.types import Batch, Carried, Group, Manifest, Sample, Sampling, TaskRef

Role: TypeAlias = Literal["environment", "engine", "engine-part", "trainer"]


# --- any worker -> controller -----------------------------------------------------------------------------------------
@attrs.frozen(kw_only=True)
class Hello:
    """First message of a worker.

    `sizes` (environment workers): `{"<environment>/<split>": number of tasks}`. `url` (engines): where its HTTP server
    listens. `world_size` and `version` (trainer ranks): ranks in all, and the policy version they hold.
    """

    role: Role
    index: int
    pid: int
    host: str
    sizes: Mapping[str, int] = attrs.field(factory=dict)
    url: str = ""
    world_size: int = 1
    version: int = 0


@attrs.frozen(kw_only=True)
class Failed:
    """The worker cannot go on (or could not do `request`); the sentence says why.

    `fatal` ends the run, because a restart would not help.
    """

    error: str
    request: int = -1
    fatal: bool = False


# --- controller <-> environment worker --------------------------------------------------------------------------------
@attrs.frozen(kw_only=True)
class RunGroup:
    """Roll out one task `size` times on one engine."""

    request: int
    group_id: int
    task: TaskRef
    attempt: int
    size: int
    sampling: Sampling
    engine: str
    """URL of the engine: siblings and turns stay on one, for its prefix cache."""
    version: int
    carried: Carried | None = None
    """What a checkpoint has of this attempt."""


@attrs.frozen(kw_only=True)
class GroupDone:
    request: int
    group: Group


@attrs.frozen(kw_only=True)
class KeepInFlight:
    """Write what is finished of the worker's groups into the file `path`: tokens of versions up to `version`."""

    request: int
    path: str
    version: int


@attrs.frozen(kw_only=True)
class InFlightKept:
    """It is on disk; without any group there is no file."""

    request: int
    groups: tuple[Carried, ...]


@attrs.frozen(kw_only=True)
class Cancel:
    """Stop working on a request and say nothing more about it. Unknown requests are ignored."""

    request: int


@attrs.frozen(kw_only=True)
class Demonstrate:
    """Ask for demonstrations of tasks, as samples of the ce stream."""

    request: int
    tasks: tuple[TaskRef, ...]


@attrs.frozen(kw_only=True)
class Demonstrations:
    request: int
    samples: tuple[Sample, ...]


# --- controller <-> trainer rank --------------------------------------------------------------------------------------
@attrs.frozen(kw_only=True)
class TrainStep:
    """One optimizer step. `batch.ranks` holds only the receiving rank's micro-batches, as its single entry."""

    batch: Batch
    learning_rate: float
    publish: bool
    """Send the new weights through the transport when the step is done (all ranks take part)."""
    trace: str = ""
    """Folder into which every rank writes a trace of this step; empty: none."""


@attrs.frozen(kw_only=True)
class StepDone:
    """What a rank reports after a step, and the manifest of the part it published, if it was asked to.

    `sums` are over the rank's own tokens; the controller adds ranks and divides `loss/<stream>[/<metric>]` by the
    stream's global token count, and `mismatch/k3`, `mismatch_fresh/k3` and `entropy` by `<first word>/count`.
    `values` are equal on all ranks (`grad_norm`). `seconds`: phase -> seconds of the rank (`wait`, `forward_backward`,
    `optimizer`, `publish`). `peaks`: bytes, of which the controller keeps the largest rank's (`memory/peak`).
    """

    step: int
    version: int
    sums: Mapping[str, float]
    values: Mapping[str, float]
    seconds: Mapping[str, float]
    peaks: Mapping[str, float] = attrs.field(factory=dict)
    manifest: Manifest | None = None


@attrs.frozen(kw_only=True)
class Publish:
    """Send the current weights (used once, before the first rollout). Answered by StepDone with no sums."""


@attrs.frozen(kw_only=True)
class Retire:
    """No engine will ask for this version again."""

    version: int


@attrs.frozen(kw_only=True)
class Save:
    """Copy this rank's state as it is now, and write the copy into the folder `path` while training goes on."""

    step: int
    path: str


@attrs.frozen(kw_only=True)
class Saved:
    """A rank's part of a checkpoint is on disk. Comes when it does, over a connection of its own."""

    step: int
    rank: int
    files: Mapping[str, FileRecord]
    """Path relative to the checkpoint -> what was written."""


# --- controller -> any worker -----------------------------------------------------------------------------------------
@attrs.frozen(kw_only=True)
class Stop:
    """The run is over: clean up and exit 0."""


TO_CONTROLLER = (Hello, Failed, GroupDone, Demonstrations, InFlightKept, StepDone, Saved)
TO_WORKER = (RunGroup, Cancel, Demonstrate, KeepInFlight, TrainStep, Publish, Retire, Save, Stop)
