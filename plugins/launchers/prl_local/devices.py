"""Which devices of this machine each process of a run has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice

import attrs
from prl.compose.plan import Process
from prl.supervise.devices import VISIBLE, ask, given, has_driver


def placed(processes: Sequence[Process]) -> tuple[Process, ...]:
    """With the devices of this machine, which is asked for them only where a process wants some."""
    wanted = any(process.gpus for process in processes)
    return divided(processes, found() if wanted else ())


def divided(processes: Sequence[Process], devices: Sequence[str]) -> tuple[Process, ...]:
    """Every process that asks for devices has some of its own; where there are too few, all share all."""
    if not 0 < sum(process.gpus for process in processes) <= len(devices):
        return tuple(processes)
    left = iter(devices)
    return tuple(
        attrs.evolve(process, env={**process.env, VISIBLE: ",".join(islice(left, process.gpus))})
        if process.gpus
        else process
        for process in processes
    )


def found() -> list[str]:
    """What this process sees, or else what the driver knows of; none without a driver."""
    if VISIBLE in os.environ:
        return given()
    if not has_driver():
        return []
    listed = ask("--query-gpu=index", "--format=csv,noheader")
    return listed.stdout.split() if listed.returncode == 0 else []
