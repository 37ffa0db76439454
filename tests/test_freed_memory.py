"""Freed memory is there for the next step."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import resource
import sys

import numpy as np

from prl.freed_memory import keep_freed

BLOCKS, BYTES, STEPS = 3, 2**24, 10

def step():
    for block in [np.empty(BYTES, np.uint8) for _ in range(BLOCKS)]:
        block.fill(1)

if sys.argv[1] == "keep":
    keep_freed()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(STEPS):
    step()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults * resource.getpagesize() / (STEPS * BLOCKS * BYTES))
"""


def renewed(how: str) -> float:
    """Share of a repeated step's memory that came from the system."""
    done = subprocess.run([sys.executable, "-c", _PROGRAM, how], check=True, capture_output=True, text=True)
    return float(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have rules of their own")
def test_a_step_reuses_the_memory_of_the_step_before() -> None:
    assert renewed("keep") < 0.1
