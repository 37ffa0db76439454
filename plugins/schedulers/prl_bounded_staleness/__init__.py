"""Plugin `bounded_staleness`: no token is trained more than `max_staleness` versions after it was sampled."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from prl import hookimpl, option
from prl.compose.config import Run, SchedulerConfig, not_negative, positive
from prl.providers import Scheduler


@attrs.frozen(kw_only=True)
class BoundedStalenessConfig(SchedulerConfig):
    """`[scheduler] type = "bounded_staleness"`."""

    max_staleness: int = option(
        1, help="most versions between sampling and training a token; 0 is synchronous", validator=not_negative
    )
    together: int = option(
        1,
        help="start groups only when there is room for so many, at most max_staleness * rollouts.groups_per_step: more "
        "decode at once, which costs less per token where engines wait for the trainer, and are older when trained",
        validator=positive,
    )


@hookimpl
def prl_schedulers() -> list[Scheduler]:
    return [
        Scheduler(
            name="bounded_staleness",
            config=BoundedStalenessConfig,
            summary="generation runs ahead of training by at most max_staleness versions",
            build="prl_bounded_staleness.scheduler:build",
        )
    ]


@hookimpl
def prl_validate(run: Run) -> Iterable[str]:
    """Groups that wait for each other must not wait for ever."""
    scheduler = getattr(run.scheduler, "within", run.scheduler)
    if isinstance(scheduler, BoundedStalenessConfig):
        most = max(1, scheduler.max_staleness * run.rollouts.groups_per_step)
        if scheduler.together > most:
            yield (
                f"scheduler.together = {scheduler.together} groups may never find room: at most {most}, which is "
                f"scheduler.max_staleness = {scheduler.max_staleness} times rollouts.groups_per_step = "
                f"{run.rollouts.groups_per_step}"
            )
