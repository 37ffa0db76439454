"""What a rank did and when, as a trace that Perfetto and chrome://tracing show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@contextmanager
def traced(folder: str, rank: int) -> Iterator[None]:
    """What happens inside goes to `<folder>/rank-<rank>.json`; nothing is recorded where `folder` is empty."""
    if not folder:
        yield
        return
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        yield
    Path(folder).mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(Path(folder) / f"rank-{rank}.json"))
