"""Plugin `local`: every process of the run on this machine. `launcher.py` is built in the launching process only."""

from __future__ import annotations

import attrs
from prl import hookimpl
from prl.compose.config import LauncherConfig
from prl.providers import Launcher


@attrs.frozen(kw_only=True)
class LocalConfig(LauncherConfig):
    """`[launcher] type = "local"`."""


@hookimpl
def prl_launchers() -> list[Launcher]:
    return [
        Launcher(
            name="local",
            config=LocalConfig,
            summary="every process on this machine, ended together",
            build="prl_local.launcher:build",
        )
    ]
