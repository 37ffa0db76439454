"""Plugin `wandb`: metrics and the resolved config to Weights & Biases.

`tracker.py` imports the wandb package, in the controller only.
"""

from __future__ import annotations

from typing import Literal

import attrs
from prl import hookimpl, option
from prl.compose.config import TrackerConfig
from prl.providers import Tracker


@attrs.frozen(kw_only=True)
class WandbConfig(TrackerConfig):
    """`[[trackers]] type = "wandb"`."""

    project: str = option("prl", help="project the run is filed under")
    entity: str = option("", help="user or team that owns the project; empty: the login's default")
    mode: Literal["online", "offline", "disabled"] = option(
        "online", help="offline writes into the run directory, for `wandb sync` later"
    )
    name: str = option("", help="display name; empty: the name of the run directory")
    tags: tuple[str, ...] = option((), help="tags of the run")


@hookimpl
def prl_trackers() -> list[Tracker]:
    return [
        Tracker(
            name="wandb",
            config=WandbConfig,
            summary="metrics to Weights & Biases, online or into an offline run",
            requires=("wandb",),
            build="prl_wandb.tracker:build",
        )
    ]
