"""The real controller keeps the ledger: whole runs around workers that speak real messages, audited from files."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import attrs
import pytest
from prl.errors import RunError
from prl.ledger.audit import audit
from prl.ledger.explain import explain
from prl.ledger.read import last_failure, snapshot
from prl.ledger.report import Audit
from prl.messages import Failed, RunGroup, TrainStep
from prl.run_dir import RunDir

from tests.dispatch.fakes import FakeEngine, FakeEnvironment, FakeRun, FakeTrainer, answer, toy_run


def problems(found: Audit) -> list[str]:
    return [problem for check in found.checks for problem in check.problems]


def numbers(found: Audit) -> dict[str, str]:
    return {check.name: check.numbers for check in found.checks}


def rows(run: FakeRun, query: str) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in snapshot(run.run_dir.ledger).execute(query)]


def coded(line: dict[str, Any]) -> str:
    return ",".join(f"{v}:{n}" for v, n in zip(line["versions"], line["version_tokens"], strict=True))


def unlucky(request: RunGroup) -> Any:
    """Group 1 fails once, 2 comes back stale, 3 without one of its rollouts, 4 is never answered at first."""
    first = request.attempt == 0
    match request.group_id:
        case 1 if first:
            return Failed(error="the environment has no such file")
        case 3:
            return answer(request, failed=1)
        case 4 if first:
            return None
    return answer(request)


@pytest.fixture(scope="module")
def eventful(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    run = FakeRun(
        tmp_path_factory.mktemp("eventful"),
        toy_run(
            warmup=2,
            steps=8,
            max_staleness=2,
            engines=2,
            evaluation={"every": 4, "tasks": 3},
            checkpoints={"every": 3, "keep_last": 0},
        ),
        environments=[FakeEnvironment(reply=unlucky)],
        engines=[FakeEngine(), FakeEngine()],
    )
    run.go()
    return run


def test_an_eventful_run_passes(eventful: FakeRun) -> None:
    found = audit(eventful.run_dir)
    assert problems(found) == []
    assert found.launches == ("launch 1: from step 0, did 10 steps (1-10); finished",)
    assert numbers(found)["batches"] == "8 rl batches, 2 warmup batches"
    assert numbers(found)["versions"].startswith("versions 0-10: 10 published")
    assert numbers(found)["checkpoints"] == "4 checkpoints, of steps 3, 6, 9-10"


def test_the_ledger_agrees_with_the_other_records(eventful: FakeRun) -> None:
    trained = rows(
        eventful,
        "SELECT b.step, i.group_id, r.member, i.attempt, r.length, r.reward, r.advantage, r.versions FROM batches b"
        " JOIN members m ON m.batch = b.id JOIN issues i ON i.id = m.issue JOIN rollouts r ON r.issue = i.id"
        " ORDER BY b.step, m.ordinal, r.member",
    )
    names = ("attempt", "length", "reward", "advantage")
    assert trained == [
        (line["step"], line["group_id"], int(line["member"]), *(line[name] for name in names), coded(line))
        for line in eventful.trained()
    ]
    lines = [*eventful.lines("warmup"), *eventful.lines("rl")]
    assert rows(eventful, "SELECT step, tokens, sampled FROM batches ORDER BY step") == [
        (line["step"], line["tokens/trained"], line["tokens/sampled"]) for line in lines
    ]


def test_where_a_group_went_and_what_became_of_it(eventful: FakeRun) -> None:
    lost = rows(
        eventful, "SELECT attempt, dropped, again, worker FROM issues WHERE group_id = 1 AND feed = 'rl' ORDER BY id"
    )
    assert lost == [(0, "environment", 1, "environment-0"), (1, None, None, "environment-0")]
    assert {engine for (engine,) in rows(eventful, "SELECT engine FROM issues WHERE feed = 'rl'")} == {0, 1}
    asked = {(r.group_id, r.attempt): r.version for r in eventful.environments[0].asked if r.group_id >= 0}
    placed = rows(eventful, "SELECT group_id, attempt, version FROM issues WHERE feed = 'rl' AND placed_at > 0")
    assert {(group_id, attempt): version for group_id, attempt, version in placed} == asked
    assert rows(eventful, "SELECT who, sentence, done FROM failures WHERE who = '3.3'") == [
        ("3.3", "broke", "group 3 goes on without it")
    ]


def test_engines_and_versions(eventful: FakeRun) -> None:
    for index, engine in enumerate(eventful.engines):
        events = rows(eventful, f"SELECT event, version FROM engines WHERE engine = {index} ORDER BY rowid")
        assert [version for event, version in events if event == "committed"] == engine.committed
        assert [event for event, _ in events if event != "committed"] == ["joined"]
    saved = json.loads((eventful.run_dir.checkpoints / "step-6" / "controller.json").read_text())
    assert [(saved["chain"],)] == rows(eventful, "SELECT chain FROM versions WHERE version = 6")
    assert rows(eventful, "SELECT step FROM checkpoints ORDER BY step") == [(3,), (6,), (9,), (10,)]


def test_a_step_is_explained(eventful: FakeRun) -> None:
    step = explain(eventful.run_dir, 4)
    lines = [line for line in eventful.trained() if line["step"] == 4]
    assert (step["state"], step["phase"], step["version"], step["streams"]) == (
        "trained",
        "rl",
        3,
        {"rl": step["sampled"]},
    )
    assert [group["group_id"] for group in step["groups"]] == sorted({line["group_id"] for line in lines})
    assert [r["advantage"] for g in step["groups"] for r in g["rollouts"]] == [line["advantage"] for line in lines]
    (metrics,) = (line for line in eventful.lines("rl") if line["step"] == 4)
    assert step["metrics"]["loss/rl"] == metrics["loss/rl"]
    assert (step["weights"]["trained"]["version"], step["weights"]["made"]["version"]) == (3, 4)
    dropped = [group for n in range(1, 11) for group in explain(eventful.run_dir, n)["excluded"]["groups"]]
    assert {(group["group_id"], group["reason"]) for group in dropped} >= {(1, "environment"), (4, "stale")}


# --- ends that nobody planned -----------------------------------------------------------------------------------------
def continued(run: FakeRun, step: int, **changes: Any) -> FakeRun:
    """The same directory, from the checkpoint of a step (0: from the beginning), with workers of its own."""
    source = str(run.run_dir.checkpoints / f"step-{step}") if step else ""
    section = attrs.evolve(run.run.checkpoints, resume=source)
    return FakeRun(
        run.path, attrs.evolve(run.run, checkpoints=section), trainers=[FakeTrainer(version=step)], **changes
    )


def newest(run: FakeRun) -> int:
    steps = (int(path.name.removeprefix("step-")) for path in run.run_dir.checkpoints.glob("step-*[0-9]"))
    return max(steps, default=0)


@pytest.mark.parametrize("requests", [9, 17, 30])
def test_a_run_that_is_terminated_and_resumed_loses_and_repeats_nothing(tmp_path: Path, requests: int) -> None:
    first = FakeRun(tmp_path, toy_run(steps=20, max_staleness=2, checkpoints={"every": 1, "keep_last": 0}))
    environment = first.environments[0]

    def reply(request: RunGroup) -> Any:
        if len(environment.asked) == requests:
            first.terminate()
        return None if request.group_id % 7 == 3 and request.attempt == 0 else unlucky(request)

    environment.reply = reply
    with pytest.raises(asyncio.CancelledError):
        first.go()
    assert problems(audit(first.run_dir)) == []
    step = newest(first)
    continued(first, step).go()
    found = audit(first.run_dir)
    assert problems(found) == []
    assert found.launches[0].endswith("failed: terminated by a signal")
    assert found.launches[1] == f"launch 2: from step {step}, did {20 - step} steps ({step + 1}-20); finished"
    trained = rows(
        first,
        "SELECT i.group_id FROM batches b JOIN members m ON m.batch = b.id JOIN issues i ON i.id = m.issue"
        " WHERE b.void_by IS NULL AND b.done_at > 0 ORDER BY 1",
    )
    assert trained == [(group_id,) for group_id in range(40)]


def test_steps_after_the_checkpoint_are_undone_and_done_again(tmp_path: Path) -> None:
    first = FakeRun(tmp_path, toy_run(steps=6, max_staleness=1, checkpoints={"every": 2, "keep_last": 0}))
    first.go()
    continued(first, 2).go()
    found = audit(first.run_dir)
    assert problems(found) == []
    assert numbers(found)["prompts (rl)"].startswith("12 groups: 12 trained")
    assert explain(first.run_dir, 4)["undone"] == [1]
    assert explain(first.run_dir, 2)["undone"] == []


def test_a_fork_in_another_directory_is_a_record_of_its_own(tmp_path: Path) -> None:
    first = FakeRun(tmp_path / "first", toy_run(steps=4, checkpoints={"every": 2, "keep_last": 0}))
    first.go()
    section = attrs.evolve(first.run.checkpoints, resume=str(first.run_dir.checkpoints / "step-2"))
    fork = FakeRun(tmp_path / "fork", attrs.evolve(first.run, checkpoints=section), trainers=[FakeTrainer(version=2)])
    fork.go()
    found = audit(fork.run_dir)
    assert problems(found) == []
    assert rows(fork, "SELECT chain FROM versions WHERE version = 2") == rows(
        first, "SELECT chain FROM versions WHERE version = 2"
    )
    assert "what was trained before step 2: this run continues another run's checkpoint" in found.unproven


def test_a_step_that_fails_leaves_its_batch_unfinished(tmp_path: Path) -> None:
    def fail(order: TrainStep) -> None:
        if order.batch.step == 3:
            raise RuntimeError("the loss is not finite")

    run = FakeRun(tmp_path, toy_run(steps=5), trainers=[FakeTrainer(before_step=fail)])
    with pytest.raises(RunError):
        run.go()
    found = audit(run.run_dir)
    assert problems(found) == []
    assert "step 3" in numbers(found)["batches"]
    assert found.launches[0].endswith("failed: trainer-0 cannot go on: the loss is not finite")
    assert explain(run.run_dir, 3)["state"] == "handed to the trainer, not done"


def test_an_engine_that_leaves_is_on_record(tmp_path: Path) -> None:
    engines = [FakeEngine(), FakeEngine()]

    def break_engine(order: TrainStep) -> None:
        engines[1].broken.add("prepare")

    run = FakeRun(
        tmp_path,
        toy_run(steps=4, max_staleness=3, engines=2),
        trainers=[FakeTrainer(before_step=break_engine)],
        engines=engines,
    )
    run.go()
    assert ("left", 0, "prepare is broken") in rows(run, "SELECT event, version, detail FROM engines WHERE engine = 1")
    failures = rows(run, "SELECT sentence, done FROM failures WHERE who = 'engine 1' ORDER BY rowid")
    assert failures[0] == ("prepare is broken", "evicted until it is caught up; updates missed in a row: 1")
    assert last_failure(run.run_dir.ledger)
    assert problems(audit(run.run_dir)) == []


def test_a_ledger_that_cannot_be_written_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, toy_run(), environments=[], trainers=[], engines=[])
    RunDir(tmp_path).ledger.mkdir()
    with pytest.raises(RunError, match="cannot open the ledger"):
        run.go()
    assert run.state["status"] == "failed"
    assert "cannot open the ledger" in run.state["error"]
