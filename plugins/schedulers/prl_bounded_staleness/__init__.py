"""Plugin `bounded_staleness`: no token is trained more than `max_staleness` versions after it was sampled."""

from __future__ import annotations

import attrs
from prl import hookimpl, option
from prl.compose.config import SchedulerConfig, not_negative
from prl.providers import Scheduler


@attrs.frozen(kw_only=True)
class BoundedStalenessConfig(SchedulerConfig):
    """`[scheduler] type = "bounded_staleness"`."""

    max_staleness: int = option(
        1, help="most versions between sampling and training a token; 0 is synchronous", validator=not_negative
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
