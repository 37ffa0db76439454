"""Every hook of prl: the whole surface a plugin can touch, on one page.

*Registration* hooks are called once in every process, when the run is composed. They return inert records (see
`providers.py`) and import nothing heavy: no torch, vllm, transformers, wandb.

*Lifecycle* hooks act by presence. They are called in the controller only, synchronously, in the order of the config's
`plugins` list; they must not block. An implementation that raises is reported and the others still run; after three
failures in a row it is switched off. There are none in trainer ranks or engines, where a hook present on some ranks
only would deadlock a collective.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

from prl.compose.config import Run
from prl.providers import (
    Advantage,
    Engine,
    Environment,
    Kernel,
    Launcher,
    Limit,
    Loss,
    Model,
    Optimizer,
    Quantization,
    RunInfo,
    Scheduler,
    Tracker,
    WeightTransport,
)

if TYPE_CHECKING:
    from prl.types import Group

hookspec = pluggy.HookspecMarker("prl")


# --- what a plugin provides -------------------------------------------------------------------------------------------
@hookspec
def prl_models() -> Iterable[Model]:
    """Model families: network, weight names, chat format."""
    raise NotImplementedError


@hookspec
def prl_environments() -> Iterable[Environment]:
    """Tasks, how one becomes a rollout, and its reward."""
    raise NotImplementedError


@hookspec
def prl_schedulers() -> Iterable[Scheduler]:
    """Rollout schedulers: which groups start, which are fresh enough to train on."""
    raise NotImplementedError


@hookspec
def prl_advantages() -> Iterable[Advantage]:
    """Rewards of a group to per-token credit."""
    raise NotImplementedError


@hookspec
def prl_losses() -> Iterable[Loss]:
    """Per-token losses over log-probabilities."""
    raise NotImplementedError


@hookspec
def prl_optimizers() -> Iterable[Optimizer]:
    """Optimizers."""
    raise NotImplementedError


@hookspec
def prl_quantizations() -> Iterable[Quantization]:
    """Number formats of training, transfer and serving."""
    raise NotImplementedError


@hookspec
def prl_engines() -> Iterable[Engine]:
    """Inference engines."""
    raise NotImplementedError


@hookspec
def prl_weight_transports() -> Iterable[WeightTransport]:
    """How a weight version reaches the engines."""
    raise NotImplementedError


@hookspec
def prl_kernels() -> Iterable[Kernel]:
    """Other ways to compute an operation of the model's blocks."""
    raise NotImplementedError


@hookspec
def prl_trackers() -> Iterable[Tracker]:
    """Where metrics are shown."""
    raise NotImplementedError


@hookspec
def prl_launchers() -> Iterable[Launcher]:
    """Where processes run."""
    raise NotImplementedError


# --- what a plugin checks ---------------------------------------------------------------------------------------------
@hookspec
def prl_validate(run: Run, limits: Sequence[Limit]) -> Iterable[str]:
    """Problems across sections, one sentence each, collected and shown together; runs where the run is composed.

    `limits` are what the run's model says about how far it can be spread; none where it says nothing.
    """
    raise NotImplementedError


# --- what a plugin observes -------------------------------------------------------------------------------------------
@hookspec
def prl_run_start(info: RunInfo) -> None:
    """Every process has said hello; nothing was generated yet."""


@hookspec
def prl_group_done(group: Group, version: int) -> None:
    """A group arrived; `version` is the newest one served."""


@hookspec
def prl_step_end(step: int, version: int, metrics: Mapping[str, float]) -> None:
    """The trainer finished step `step` and yielded `version`."""


@hookspec
def prl_weights_published(version: int, seconds: float) -> None:
    """Every engine serves `version`; `seconds` from the end of the step to the last acknowledgement."""


@hookspec
def prl_checkpoint_saved(step: int, path: Path) -> None:
    """A checkpoint is complete on disk."""


@hookspec
def prl_run_end(info: RunInfo, error: BaseException | None) -> None:
    """The last thing the controller does; `error` is None for a run that reached its end or was stopped."""
