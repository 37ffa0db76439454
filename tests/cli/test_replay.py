"""`prl replay` before anything is started: what the user wrote wrong, and how what came of it is shown."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from prl.cli import main
from prl.cli.replay import page
from prl.replay.compare import Difference
from prl.replay.history import Segment
from prl.replay.launch import Replayed
from prl.replay.order import Report

from tests.dispatch.fakes import FakeRun, toy_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    fake = FakeRun(tmp_path_factory.mktemp("run"), toy_run())
    fake.go()
    return fake


@pytest.mark.parametrize("until", ["0", "4", "-1"])
def test_a_step_that_is_not_on_record(run: FakeRun, until: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(run.path), "--until", until]) == 2
    assert capsys.readouterr().err == f"--until {until}: the ledger of {run.path} has steps 1 to 3\n"


def test_a_run_without_a_log(run: FakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run.path, tmp_path / "run", ignore=shutil.ignore_patterns("events"))
    assert main(["replay", str(tmp_path / "run")]) == 2
    expected = 'has no event log of launch 1, which trained steps 1 to 3: it ran with run.event_log = "off"'
    assert expected in capsys.readouterr().err


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    assert main(["replay", str(tmp_path)]) == 2


def told(report: Report) -> list[str]:
    segment = Segment(launch=2, start=4, end=9, log=Path("log"), followed_by=None)
    return list(page([Replayed(segment=segment, report=report)]))


def test_what_is_equal() -> None:
    assert told(Report(trained=9, weights=5)) == [
        "launch 2: steps 5 to 9 replayed; batches and weights (5 of them published) are equal, bit for bit"
    ]


def test_what_differs_first() -> None:
    difference = Difference(step=5, what="the batch", recorded="aa", replayed="bb", detail="reward was 1, and is 0")
    assert told(Report(trained=4, weights=0, difference=difference, error="step 5 differs: the batch"))[1:] == [
        "step 5 differs: the batch",
        "  recorded  aa",
        "  replayed  bb",
        "  reward was 1, and is 0",
    ]


def test_a_replay_that_ends_early_says_why() -> None:
    assert told(Report(trained=6, weights=2, error="the event log ends"))[1:] == ["the event log ends"]
    assert told(Report(trained=6, weights=2))[1:] == ["stopped before step 9"]
