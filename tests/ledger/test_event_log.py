"""The event log: whole records whatever a kill leaves, no damage taken for data, and a run that outlives its log."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import get_args

import attrs
import numpy as np
import pytest
from prl.columns import ColumnFolder
from prl.dispatch.feed import Issue
from prl.errors import RunError
from prl.ledger import event_log, facts
from prl.ledger.event_log import EventLog, LogDamagedError
from prl.ledger.events import (
    EVENTS,
    Arrived,
    Begun,
    Continued,
    Cut,
    Demonstrated,
    Dropped,
    Event,
    Issued,
    Loads,
    Served,
    Taken,
    Trained,
)
from prl.ledger.read import snapshot
from prl.providers import EngineLoad
from prl.run_dir import RunDir
from prl.types import Group, TaskRef

from tests.dispatch.fakes import FakeRun, demonstration, rollout, toy_run

TASK = TaskRef(environment="toy", split="train", index=3)
LOAD = EngineLoad(
    engine=1, running=8.0, waiting=2.0, kv_usage=0.5, preemptions=1.0, sequences=8.0, kv_tokens=4096.0, length=512.0
)
ONE_OF_EACH: tuple[Event, ...] = (
    Begun(launch=1, config="[run]", lock="{}"),
    Continued(step=2, source="", state="{}"),
    Issued(Issue(group_id=7, task=TASK, attempt=1, position=5)),
    Arrived(
        group=Group(group_id=7, task=TASK, attempt=1, started_version=0, rollouts=(rollout("7.0", reward=1.0),)),
        admitted=True,
        restored=False,
    ),
    Dropped(group_id=7, reason="stale", again=True, cut=False),
    Taken((7, 9)),
    Demonstrated(group_ids=(0,), samples=(demonstration(2),)),
    Trained(3),
    Served(3),
    Loads(at=2.5, loads=(LOAD,)),
    Cut(3),
)


def written(path: Path, events: tuple[Event, ...]) -> bytes:
    content = event_log.MAGIC + b"".join(event_log.record(1.5 + n, event) for n, event in enumerate(events))
    path.write_bytes(content)
    return content


def read(path: Path) -> list[Event]:
    return [event for _, event in event_log.read(path)]


def columns(group: Group) -> list[list[float]]:
    names = ("tokens", "sampled", "logprobs", "versions")
    return [getattr(rollout, name).tolist() for rollout in group.rollouts for name in names]


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    assert {type(event) for event in ONE_OF_EACH} == set(EVENTS) == set(get_args(Event))
    written(tmp_path / "log", ONE_OF_EACH)
    found = list(event_log.read(tmp_path / "log"))
    assert [at for at, _ in found] == [1.5 + n for n in range(len(ONE_OF_EACH))]
    for before, (_, after) in zip(ONE_OF_EACH, found, strict=True):
        if isinstance(before, Arrived) and isinstance(after, Arrived):
            assert columns(after.group) == columns(before.group)
            assert after.group.rewards == before.group.rewards
        elif isinstance(before, Demonstrated) and isinstance(after, Demonstrated):
            assert after.group_ids == before.group_ids
            assert np.array_equal(after.samples[0].tokens, before.samples[0].tokens)
        else:
            assert after == before


def test_wherever_it_is_cut_the_records_before_are_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    content = written(path, ONE_OF_EACH)
    ends = [len(event_log.MAGIC)]
    for number, event in enumerate(ONE_OF_EACH):
        ends.append(ends[-1] + len(event_log.record(1.5 + number, event)))
    for length in range(len(event_log.MAGIC), len(content)):
        path.write_bytes(content[:length])
        assert len(read(path)) == sum(end <= length for end in ends[1:])


@pytest.mark.parametrize("offset", [9, 15, 25])
def test_a_flipped_byte_of_a_record_is_damage(tmp_path: Path, offset: int) -> None:
    """Of its checksum, its time and its content; of the last record it may be a write that never ended."""
    path = tmp_path / "log"
    content = bytearray(written(path, ONE_OF_EACH))
    content[len(event_log.MAGIC) + offset] ^= 4
    path.write_bytes(content)
    with pytest.raises(LogDamagedError, match=f"the record at byte {len(event_log.MAGIC)} is not what was written"):
        read(path)
    content = bytearray(written(path, ONE_OF_EACH))
    content[-1] ^= 4
    path.write_bytes(content)
    assert read(path)[-1] == ONE_OF_EACH[-2]


def test_another_file_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"something else")
    with pytest.raises(RunError, match="is no event log"):
        read(tmp_path / "log")


def test_a_run_without_a_log(tmp_path: Path) -> None:
    run = toy_run()
    quiet = FakeRun(tmp_path, attrs.evolve(run, run=attrs.evolve(run.run, event_log="off")))
    quiet.go()
    assert not quiet.run_dir.events.exists()


def test_a_log_that_cannot_be_written_is_left_and_the_run_goes_on(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, toy_run())
    run.run_dir.events.write_text("in the way")
    run.go()
    assert run.state["status"] == "finished"
    failures = snapshot(run.run_dir.ledger).execute("SELECT who, sentence, done FROM failures").fetchall()
    ((who, sentence, done),) = [tuple(row) for row in failures]
    assert (who, done) == ("event log", "the run goes on; `prl replay` can repeat it up to here")
    assert "cannot be written" in sentence


@pytest.mark.parametrize(("keep", "kept"), [("tokens", False), ("all", True)])
def test_large_columns_stay_where_the_run_removes_them(tmp_path: Path, keep: str, kept: bool) -> None:
    run_dir = RunDir(tmp_path)
    for path in (run_dir.config, run_dir.lock):
        path.write_text("")
    folder = ColumnFolder(run_dir.columns)
    routes = np.arange(6, dtype=np.uint8).reshape(3, 2)
    piece = folder.write({"routes": routes}, group_id=7, attempt=0)["routes"]
    one = attrs.evolve(rollout("7.0", prompt=1, sampled=2), large={"routes": (piece,)})
    group = Group(group_id=7, task=TASK, attempt=0, started_version=0, rollouts=(one,))
    log = EventLog(run_dir, keep)  # type: ignore[arg-type]
    log.begin(1, 0.0)
    log.append([(0.0, facts.Arrived(group=group, admitted=True))])
    log.close()
    folder.clear()
    left = event_log.columns_of(run_dir, 1)
    assert (os.listdir(left) if left.exists() else []) == ([piece.file] if kept else [])
    if kept:
        assert np.array_equal(ColumnFolder(left).read(piece), routes)


def test_the_log_of_an_attempt_has_the_trainer_it_ran_on(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.config.write_text("[trainer]\nranks = 2\nnodes = 2\nthreads = 3\n")
    run_dir.lock.write_text("")
    run_dir.write_json(run_dir.resume, {"checkpoint": "", "trainer": {"nodes": 1, "ranks": 1}})
    log = EventLog(run_dir, "tokens")
    log.begin(2, 0.0)
    log.close()
    (begun,) = read(event_log.path_of(run_dir, 2))
    assert isinstance(begun, Begun)
    assert tomllib.loads(begun.config)["trainer"] == {"ranks": 1, "nodes": 1, "threads": 3}
