"""Signs of life, as both ends see them."""

from __future__ import annotations

import os
from pathlib import Path

import attrs
import pytest
from prl.run_dir import RunDir
from prl.supervise.beats import Beat, Pulse


@attrs.define
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def test_silence_is_the_time_since_something_changed(run_dir: RunDir) -> None:
    clock, beat = Clock(), Beat(run_dir, "engine-0")
    pulse = Pulse(run_dir, clock=clock)
    pulse.expect("engine-0")
    clock.now += 5
    assert pulse.silent("engine-0") == 5
    beat()
    assert pulse.silent("engine-0") == 0
    clock.now += 7
    assert pulse.silent("engine-0") == 7
    beat()
    clock.now += 1
    assert pulse.silent("engine-0") == 0  # it spoke since the last look, whenever that was


def test_what_an_earlier_life_wrote_is_no_sign_of_this_one(run_dir: RunDir) -> None:
    clock = Clock()
    Beat(run_dir, "engine-0")()
    pulse = Pulse(run_dir, clock=clock)
    pulse.expect("engine-0")
    clock.now += 9
    assert pulse.silent("engine-0") == 9


def test_who_ends_in_good_order_is_not_waited_for(run_dir: RunDir) -> None:
    beat, pulse = Beat(run_dir, "controller-loop"), Pulse(run_dir, clock=Clock())
    beat()
    assert pulse.names("controller-loop") == ["controller-loop"]
    beat.end()
    assert pulse.names("controller-loop") == []


def test_a_file_s_times_do_not_matter(run_dir: RunDir) -> None:
    """Another host's clock, or one that was set back, wrote them."""
    clock, beat = Clock(), Beat(run_dir, "engine-0")
    pulse = Pulse(run_dir, clock=clock)
    pulse.expect("engine-0")
    for moment in (0, 4_000_000_000, 1):
        clock.now += 1
        beat()
        os.utime(run_dir.beats / "engine-0", (moment, moment))
        assert pulse.silent("engine-0") == 0


def test_the_process_is_known_by_its_own_id(run_dir: RunDir) -> None:
    pulse = Pulse(run_dir, clock=Clock())
    assert pulse.pid("engine-0") == -1
    Beat(run_dir, "engine-0")()
    assert pulse.pid("engine-0") == os.getpid()


def test_processes_that_nobody_started_from_here_are_found(run_dir: RunDir) -> None:
    for name in ("trainer-rank-1", "trainer-rank-0", "engine-0"):
        Beat(run_dir, name)()
    (run_dir.beats / "trainer-rank-1.condemned").touch()
    assert Pulse(run_dir, clock=Clock()).names("trainer-rank-") == ["trainer-rank-0", "trainer-rank-1"]
