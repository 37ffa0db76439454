"""Which run a command means, and whether it is still going."""

from __future__ import annotations

import argparse
import functools
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prl.errors import InfrastructureError, UserError
from prl.providers import RemoteRun
from prl.run_dir import SUPERVISOR, RunDir, read_json

RUNS = Path("runs")
FINAL = frozenset({"finished", "stopped", "failed"})
"""Values of `status` in state.json after which nothing changes."""


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """RUN: a run directory or a name under runs/, by default the newest."""
    parser.add_argument("directory", nargs="?", metavar="RUN", help="run directory; by default the newest in runs/")


def find_run(name: str | None) -> RunDir:
    """The run of that path or of that name under `runs/`; without a name, the newest there."""
    if name is None:
        return _newest()
    if members := sweep_of(name):
        names = [member.path.name for member in members]
        raise UserError(f"{name} is a folder of runs: name one of {', '.join(names[:5])}{', ...' * (len(names) > 5)}")
    if not Path(name).exists() and (RUNS / name).exists():
        return RunDir.existing(RUNS / name)
    return RunDir.existing(name)


def is_run(name: str) -> bool:
    """Whether `find_run` would find that name."""
    return any((folder / "run.toml").is_file() for folder in (Path(name), RUNS / name))


def sweep_of(name: str | None) -> list[RunDir]:
    """The runs of the sweep in a folder of that path, or of that name under `runs/`; none where it is no sweep."""
    if name is None or is_run(name):
        return []
    folder = Path(name) if Path(name).exists() else RUNS / name
    return [RunDir(config.parent) for config in sorted(folder.glob("*/run.toml"))]


def _newest() -> RunDir:
    configs = list(RUNS.glob("*/run.toml"))
    if not configs:
        raise UserError(f"there is no run in {RUNS.resolve()}; name a run directory, or start one with `prl launch`")
    return RunDir(max(configs, key=lambda config: config.stat().st_mtime).parent)


def state_of(run_dir: RunDir) -> dict[str, Any]:
    """What state.json says; `status` is `starting` before it exists."""
    return {"status": "starting", **(read_json(run_dir.state) or {})}


@functools.cache
def remote(run_dir: RunDir) -> RemoteRun | None:
    """The run as the system sees it that took it over; None for one that `prl launch` itself keeps."""
    if not run_dir.launch.is_file():
        return None
    from prl.compose.compose import compose

    composition = compose(run_dir.config, probe=False)
    there: RemoteRun = composition.build(composition.run.launcher, run_dir.path).remote(run_dir)
    return there


def is_over(run_dir: RunDir) -> bool:
    """The run reached a final state, or every process of it is gone from this host.

    Of a run that another system took over, that system knows: it may queue again after its last word.
    """
    there = remote(run_dir)
    if there is not None:
        try:
            return there.over()
        except InfrastructureError:
            return state_of(run_dir)["status"] in FINAL
    processes = read_json(run_dir.processes)
    return state_of(run_dir)["status"] in FINAL or bool(
        processes and not any(alive(process, run_dir) for process in processes)
    )


def alive(process: Mapping[str, Any], run_dir: RunDir) -> bool:
    """Whether a process of processes.json runs; one of another host counts as running.

    A process id that another program got meanwhile is told apart by its command line.
    """
    if process["host"] != socket.gethostname():
        return True
    command = Path(f"/proc/{process['pid']}/cmdline")
    if command.parent.parent.joinpath("self").exists():
        if not command.exists():
            return False
        words = command.read_bytes()
        if process.get("role") == SUPERVISOR:  # a program or module of prl's, not any program in a folder of that name
            return any(os.path.basename(word).startswith(b"prl") for word in words.split(b"\0"))
        return str(run_dir.path).encode() in words
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return False
    return True
