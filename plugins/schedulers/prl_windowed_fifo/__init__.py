"""Plugin `windowed_fifo`: groups are trained in issue order, except for a bounded window; a straggler is waited for."""

from __future__ import annotations

import attrs
from attrs import validators
from prl import hookimpl, option
from prl.compose.config import SchedulerConfig, not_negative
from prl.providers import Scheduler


@attrs.frozen(kw_only=True)
class WindowedFifoConfig(SchedulerConfig):
    """`[scheduler] type = "windowed_fifo"`."""

    max_staleness: int = option(
        1, help="most versions between sampling and training a token; 0 is synchronous", validator=not_negative
    )
    window_fraction: float = option(
        0.3,
        help="share of the slack (max_staleness steps' groups) by which a finished group may overtake an unfinished "
        "one; 0 is strict first in, first out",
        validator=[validators.ge(0.0), validators.le(1.0)],
    )


@hookimpl
def prl_schedulers() -> list[Scheduler]:
    return [
        Scheduler(
            name="windowed_fifo",
            config=WindowedFifoConfig,
            summary="issue order within a window: waits for stragglers, so that slow groups are not trained on less",
            build="prl_windowed_fifo.scheduler:build",
        )
    ]
