"""`failures.jsonl`, and what the controller asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prl.run_dir import RunDir
from prl.supervise import casualties
from prl.supervise.casualties import Casualty, Reader


def casualty(**changes: Any) -> Casualty:
    fields = {"attempt": 1, "role": "engine", "index": 0, "pid": 7, "sentence": "it died", "done": "started again"}
    return Casualty(**{**fields, "at": 5.0, **changes})


def test_what_was_appended_is_read_once(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    reader = Reader(run_dir)
    assert reader.read() == []
    casualties.append(run_dir, casualty())
    casualties.append(run_dir, casualty(index=1))
    assert reader.read() == [casualty(), casualty(index=1)]
    assert reader.read() == []


def test_a_line_that_is_not_whole_waits(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    casualties.append(run_dir, casualty())
    whole = run_dir.failures.read_bytes()
    run_dir.failures.write_bytes(whole + whole[:20])
    reader = Reader(run_dir)
    assert reader.read() == [casualty()]
    run_dir.failures.write_bytes(whole + whole)
    assert reader.read() == [casualty()]


def test_a_summary_counts_and_quotes_the_last(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert casualties.summary(run_dir) == ""
    for index in (1, 0, 1):
        casualties.append(run_dir, casualty(index=index))
    casualties.append(run_dir, casualty(role="trainer", sentence="trainer-0 exited", done="attempt 2 goes on"))
    assert (
        casualties.summary(run_dir) == "engine-0 1, engine-1 2, trainer-0 1; last: trainer-0 exited (attempt 2 goes on)"
    )


def test_a_process_is_condemned_once(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert casualties.condemned(run_dir, "engine-0") == ""
    casualties.condemn(run_dir, "engine-0", "it takes no weights")
    assert casualties.condemned(run_dir, "engine-1") == ""
    assert casualties.condemned(run_dir, "engine-0") == "it takes no weights"
    assert casualties.condemned(run_dir, "engine-0") == ""
