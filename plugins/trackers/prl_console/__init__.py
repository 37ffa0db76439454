"""Plugin `console`: what a run looks like from the terminal it was started in.

On a terminal a live display, elsewhere one plain line per step. `tracker.py` is built in the controller only.
"""

from __future__ import annotations

import attrs
from attrs import validators
from prl import hookimpl, option
from prl.compose.config import TrackerConfig
from prl.providers import Tracker


@attrs.frozen(kw_only=True)
class ConsoleConfig(TrackerConfig):
    """`[[trackers]] type = "console"`."""

    interval: float = option(
        1.0, help="seconds between two refreshes of the display, or two plain lines", validator=validators.ge(0.25)
    )


@hookimpl
def prl_trackers() -> list[Tracker]:
    return [
        Tracker(
            name="console",
            config=ConsoleConfig,
            summary="live display on a terminal, one line per step elsewhere",
            build="prl_console.tracker:build",
        )
    ]
