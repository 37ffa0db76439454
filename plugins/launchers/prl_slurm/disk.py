"""Whether a folder takes what a run writes, and how fast: asked on the login node and on every node.

A quota shows only when something is written; free space only when it is asked for. Imports nothing but the standard
library.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

MEGABYTES = 16
_BLOCK = os.urandom(1 << 20)  # nothing that a file system could compress


def write(file: Path) -> float:
    """Megabytes per second until the file is on disk; OSError where the folder takes none."""
    started = time.perf_counter()
    with file.open("wb") as out:
        for _ in range(MEGABYTES):
            out.write(_BLOCK)
        out.flush()
        os.fsync(out.fileno())
    return MEGABYTES / (time.perf_counter() - started)


def read(file: Path) -> float:
    """Megabytes per second; OSError where the file cannot be read, or is cut short."""
    started = time.perf_counter()
    if (size := len(file.read_bytes())) != MEGABYTES << 20:
        raise OSError(None, f"{file.name} has {size} of {MEGABYTES << 20} bytes here")
    return MEGABYTES / (time.perf_counter() - started)


def free_gb(folder: Path) -> float:
    """Gigabytes that a user may still write there, quota aside."""
    seen = os.statvfs(folder)
    return seen.f_bavail * seen.f_frsize / 1e9


def shortage(folder: Path, least_gb: float) -> str:
    """Why there is no room in the folder, or nothing."""
    free = free_gb(folder)
    return f"{folder} has {free:.1f} GB left, and launcher.free_gb is {least_gb:g}" if free < least_gb else ""


def no_room(run: Path, least_gb: float) -> str:
    """Why a run cannot be made there, or nothing: asked of the nearest folder above it that exists; leaves nothing."""
    above = next(folder for folder in (run, *run.parents) if folder.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=above) as file:
            write(Path(file.name))
    except OSError as error:
        return f"cannot write into {above}: {error.strerror or error}"
    return shortage(above, least_gb)
