"""The learning rate over a phase."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from prl.compose.config import ScheduleSection
from prl.train.schedule import learning_rate


def rates(section: ScheduleSection, total: int) -> list[float]:
    return [learning_rate(section, 2.0, step, total) for step in range(1, total + 1)]


def test_constant():
    assert rates(ScheduleSection(), 3) == [2.0, 2.0, 2.0]


def test_warmup_rises_linearly_to_the_peak():
    assert rates(ScheduleSection(warmup_steps=4), 6) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_cosine_falls_from_the_peak_to_the_final_share():
    seen = rates(ScheduleSection(type="cosine", warmup_steps=2, final=0.1), 10)
    expected = [2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 8))) for k in range(1, 9)]
    assert seen[:2] == [1.0, 2.0]
    assert seen[2:] == pytest.approx(expected)
    assert seen[-1] == pytest.approx(0.2)


def test_cosine_stays_at_the_end_when_a_phase_runs_longer():
    section = ScheduleSection(type="cosine", final=0.5)
    assert learning_rate(section, 2.0, 30, 10) == pytest.approx(1.0)


def test_a_phase_of_warmup_only():
    assert rates(ScheduleSection(type="cosine", warmup_steps=3), 3) == pytest.approx([2 / 3, 4 / 3, 2.0])


def test_the_controller_can_import_it_without_torch():
    program = "import sys, prl.train.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
