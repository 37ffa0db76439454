"""Which devices of this machine each process of a run has."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from itertools import islice

import attrs
from prl.compose.plan import Process

VISIBLE = "CUDA_VISIBLE_DEVICES"
_DRIVER = "nvidia-smi"
_DRIVER_SECONDS = 60


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
        return [device for device in os.environ[VISIBLE].split(",") if device]
    if not shutil.which(_DRIVER):
        return []
    listed = subprocess.run(
        [_DRIVER, "--query-gpu=index", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=_DRIVER_SECONDS,
        check=False,
    )
    return listed.stdout.split() if listed.returncode == 0 else []
