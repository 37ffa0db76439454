"""Plugin `adaptive`: as many groups in flight as the engines bear, by what they say of themselves, within another rule.

[scheduler]
type = "adaptive"

[scheduler.within]              # what is fresh enough stays this one's word
type = "bounded_staleness"
max_staleness = 8
"""

from __future__ import annotations

import attrs
from prl import hookimpl, option
from prl.compose.config import SchedulerConfig, not_negative, positive
from prl.providers import Scheduler


@attrs.frozen(kw_only=True)
class AdaptiveConfig(SchedulerConfig):
    """`[scheduler] type = "adaptive"`."""

    within: SchedulerConfig = option(help="the scheduler whose groups these are, by its own type")
    start: int = option(
        0,
        help="groups in flight at first; 0: as many as have room on the engines at full length",
        validator=not_negative,
    )
    most: int = option(1024, help="most groups in flight, whatever the engines bear", validator=positive)
    poll_seconds: float = option(5.0, help="seconds between two looks at the engines", validator=positive)

    @property
    def max_staleness(self) -> int:
        """The bound of `within`; AttributeError where that declares none."""
        bound: int = self.within.max_staleness  # type: ignore[attr-defined]
        return bound


@hookimpl
def prl_schedulers() -> list[Scheduler]:
    return [
        Scheduler(
            name="adaptive",
            config=AdaptiveConfig,
            summary="as many groups in flight as the engines bear (AIMD on their load), within another scheduler",
            build="prl_adaptive.scheduler:build",
        )
    ]
