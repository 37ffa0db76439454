"""What launchers ask about a machine's GPUs: which of them a process sees, and what the driver says of them."""

from __future__ import annotations

import os
import shutil
import subprocess

VISIBLE = "CUDA_VISIBLE_DEVICES"
DRIVER = "nvidia-smi"
DRIVER_SECONDS = 60


def given() -> list[str]:
    """Those that this process was given; none, too, where nobody gave it any."""
    return [device for device in os.environ.get(VISIBLE, "").split(",") if device]


def has_driver() -> bool:
    """There is a driver to ask."""
    return shutil.which(DRIVER) is not None


def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The driver's answer, whatever its exit code; TimeoutExpired when there is none."""
    return subprocess.run([DRIVER, *arguments], capture_output=True, text=True, timeout=DRIVER_SECONDS, check=False)
