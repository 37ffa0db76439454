"""Runs that are stopped, saved and continued."""

from __future__ import annotations

import json
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest
from prl import checkpoint_dir
from prl.columns import ColumnFolder
from prl.dispatch import checkpoint
from prl.errors import CheckpointError, RunError
from prl.messages import KeepInFlight, RunGroup, Save, TrainStep
from prl.types import Carried, Group
from prl_group_relative import grpo

from tests.dispatch.fakes import FakeEnvironment, FakeRun, FakeTrainer, answer, answer_with_columns, columns_of, toy_run
from tests.score.baseline import RunningBaseline


def stopping_at(step: int, run: FakeRun) -> FakeTrainer:
    """A trainer in whose step the user asks the run to stop."""

    def stop(order: TrainStep) -> None:
        if order.batch.step == step:
            run.run_dir.stop.touch()

    return FakeTrainer(before_step=stop)


def test_a_stop_file_ends_the_run_after_a_step_with_a_checkpoint(tmp_path):
    run = FakeRun(tmp_path, toy_run(steps=100_000))
    run.trainers = [stopping_at(3, run)]
    run.go()
    state = run.state
    assert (state["status"], state["error"]) == ("stopped", "")
    assert 3 <= state["step"] < 100_000
    assert (run.run_dir.checkpoints / f"step-{state['step']}" / "controller.json").is_file()
    assert run.hooks.calls[-1][1]["error"] is None


def test_a_stop_file_ends_a_run_that_waits_for_rollouts(tmp_path):
    run = FakeRun(tmp_path, toy_run())
    run.environments = [FakeEnvironment(reply=lambda request: run.run_dir.stop.touch())]
    run.go()
    assert (run.state["status"], run.state["step"]) == ("stopped", 0)
    assert not run.run_dir.checkpoints.exists()


def test_checkpoints_are_pruned(tmp_path):
    run = FakeRun(tmp_path, toy_run(steps=7, checkpoints={"every": 2, "keep_last": 2}))
    run.go()
    assert sorted(path.name for path in run.run_dir.checkpoints.iterdir()) == ["step-6", "step-7"]
    assert [call["step"] for call in run.hooks.named("prl_checkpoint_saved")] == [2, 4, 6, 7]
    assert (run.run_dir.checkpoints / "step-7" / "trainer" / "rank-0").read_text() == "7"


@pytest.mark.parametrize(("minutes", "saved"), [(1e-9, [1, 2, 3, 4]), (30.0, [3, 4]), (0.0, [3, 4])])
def test_a_checkpoint_is_due_by_steps_and_by_the_clock(tmp_path, minutes, saved):
    run = FakeRun(tmp_path, toy_run(steps=4, checkpoints={"every": 3, "minutes": minutes}))
    run.go()
    assert [call["step"] for call in run.hooks.named("prl_checkpoint_saved")] == saved


def test_checkpoints_of_every_so_many_steps_are_kept(tmp_path):
    run = FakeRun(tmp_path, toy_run(steps=7, checkpoints={"every": 1, "keep_last": 2, "keep_every": 3}))
    run.go()
    assert sorted(path.name for path in run.run_dir.checkpoints.iterdir()) == ["step-3", "step-6", "step-7"]


def test_a_resumed_run_continues_as_if_it_had_never_stopped(tmp_path):
    def asked(run: FakeRun) -> list[tuple]:
        return [(r.group_id, r.task, r.attempt, r.sampling.seed, r.version) for r in run.environments[0].asked]

    def demonstrated(run: FakeRun) -> list[list[int]]:
        orders = [o for o in run.trainers[0].steps if o.batch.phase == "warmup"]
        return [[int(t) for rank in o.batch.ranks for m in rank for t in m.tokens] for o in orders]

    whole = FakeRun(tmp_path / "whole", toy_run(steps=6, warmup=3, max_staleness=0))
    whole.go()
    for stop in (2, 5, 9):
        first = FakeRun(
            tmp_path / f"first-{stop}",
            toy_run(steps=6, warmup=3, max_staleness=0, checkpoints={"every": 1, "keep_last": 0}),
        )
        first.go()
        folder = first.run_dir.checkpoints / f"step-{stop}"
        second = FakeRun(
            tmp_path / f"second-{stop}",
            toy_run(steps=6, warmup=3, max_staleness=0, checkpoints={"resume": str(folder)}),
            trainers=[FakeTrainer(version=stop)],
        )
        second.go()
        assert second.engines[0].committed[0] == stop
        finished = [group.group_id for group in checkpoint.read(folder).groups]
        assert asked(second) == asked(whole)[max(0, stop - 3) * 2 + len(finished) :]
        assert second.trained() == [row for row in whole.trained() if row["step"] > stop]
        assert demonstrated(second) == demonstrated(whole)[stop:]
        assert second.state["step"] == 9


def test_an_advantage_with_a_memory_continues_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "build", lambda config: RunningBaseline())
    whole = FakeRun(tmp_path / "whole", toy_run(steps=6, max_staleness=0, checkpoints={"every": 1, "keep_last": 0}))
    whole.go()
    for stop in (1, 4):
        folder = whole.run_dir.checkpoints / f"step-{stop}"
        second = FakeRun(
            tmp_path / f"second-{stop}",
            toy_run(steps=6, max_staleness=0, checkpoints={"resume": str(folder)}),
            trainers=[FakeTrainer(version=stop)],
        )
        second.go()
        assert second.trained() == [row for row in whole.trained() if row["step"] > stop]
    assert len({row["advantage"] for row in whole.trained()}) > 2


def test_a_resumed_run_loses_no_task_trains_none_twice_and_generates_no_finished_group_again(tmp_path):
    """Groups of the batch formed ahead and those ready; the ones in flight are issued again, under their attempt."""
    first, folder = stopped_with_pending_groups(tmp_path / "first")
    finished = [group.group_id for group in checkpoint.read(folder).groups]
    assert len(finished) >= 2
    second = resumed(tmp_path / "second", folder)
    second.go()
    assert sorted(first.trained_groups() + second.trained_groups()) == list(range(20))
    assert not set(finished) & {request.group_id for request in second.environments[0].asked}
    assert {request.attempt for request in second.environments[0].asked} == {0}
    versions = {row["group_id"]: row["versions"] for row in second.trained()}
    assert all(versions[group_id] <= [4] for group_id in finished)


def test_finished_groups_that_are_no_longer_fresh_enough_are_generated_again(tmp_path):
    first, folder = stopped_with_pending_groups(tmp_path / "first")
    finished = [g.group_id for g in checkpoint.read(folder).groups if g.oldest_version < 4]
    assert finished
    second = resumed(tmp_path / "second", folder, max_staleness=0)
    second.go()
    assert sorted(first.trained_groups() + second.trained_groups()) == list(range(20))
    assert set(finished) <= {request.group_id for request in second.environments[0].asked}


def test_finished_groups_with_large_columns_are_trained_with_them(tmp_path):
    columns = ColumnFolder(tmp_path / "second" / "columns")
    _, folder = stopped_with_pending_groups(tmp_path / "first", large=True)
    finished = checkpoint.read(folder).groups
    assert len(finished) >= 2
    assert not (tmp_path / "first" / "columns").exists()
    seen = []
    second = resumed(tmp_path / "second", folder)
    second.environments = [FakeEnvironment(reply=answer_with_columns(columns))]
    second.trainers[0].before_step = lambda step: seen.extend(int(c.max()) for c in columns_of(step, columns))
    second.go()
    assert not {group.group_id for group in finished} & {request.group_id for request in second.environments[0].asked}
    assert sorted(seen) == [0] * 24 + [1] * 24  # six steps of two groups of four
    assert columns.files() == []


def test_a_flipped_byte_in_a_large_column_is_refused(tmp_path):
    _, folder = stopped_with_pending_groups(tmp_path / "first", large=True)
    column = min((folder / "columns").iterdir())
    flip(column)
    assert f"columns/{column.name} is damaged: its checksum is" in refusal(tmp_path, folder)


def stopped_with_pending_groups(path: Path, *, large: bool = False) -> tuple[FakeRun, Path]:
    """A run stopped in step 4, once the groups of another batch are finished."""
    run = FakeRun(path, toy_run(steps=10, max_staleness=3))
    if large:
        run.environments = [FakeEnvironment(reply=answer_with_columns(ColumnFolder(run.run_dir.columns)))]

    def stop_in_step_four(order: TrainStep) -> None:
        if order.batch.step == 4:
            run.run_dir.stop.touch()
            run.until(lambda state: state["status"] == "stopping")

    run.trainers = [FakeTrainer(before_step=stop_in_step_four)]
    run.go()
    assert (run.state["status"], run.state["step"]) == ("stopped", 4)
    return run, run.run_dir.checkpoints / "step-4"


def resumed(path: Path, folder: Path, *, max_staleness: int = 3) -> FakeRun:
    run = toy_run(steps=10, max_staleness=max_staleness, checkpoints={"resume": str(folder)})
    return FakeRun(path, run, trainers=[FakeTrainer(version=checkpoint_dir.step_of(folder))])


# --- groups in flight -------------------------------------------------------------------------------------------------
def stopped_with_groups_in_flight(path: Path) -> tuple[FakeRun, Path]:
    """A run stopped in step 2 while groups 4 to 7 have no answer; what their worker keeps is of version 1."""
    run = FakeRun(path, toy_run(steps=6, max_staleness=2))
    unanswered: list[RunGroup] = []

    def reply(request: RunGroup) -> Group | None:
        if request.group_id < 4:
            return answer(request)
        unanswered.append(request)
        return None

    def keep(order: KeepInFlight) -> tuple[Carried, ...]:
        file = Path(order.path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"tokens of groups")
        entries = [(r.group_id, r.attempt) for r in unanswered] + [
            (5, 1),
            (99, 0),
        ]  # two that this cut knows nothing of
        return tuple(
            Carried(group_id=g, attempt=a, oldest_version=1, file=str(file), offset=2 * (g % 8), nbytes=2)
            for g, a in entries
        )

    def stop_in_step_two(order: TrainStep) -> None:
        if order.batch.step == 2:
            run.run_dir.stop.touch()
            run.until(lambda state: state["status"] == "stopping" and len(unanswered) == 4)

    run.environments = [FakeEnvironment(reply=reply, keep=keep)]
    run.trainers = [FakeTrainer(before_step=stop_in_step_two)]
    run.go()
    return run, run.run_dir.checkpoints / "step-2"


def test_what_is_finished_of_groups_in_flight_goes_to_whoever_rolls_them_out_again(tmp_path):
    first, folder = stopped_with_groups_in_flight(tmp_path / "first")
    kept = checkpoint.read(folder).in_flight
    assert [(entry.group_id, entry.attempt, entry.offset) for entry in kept] == [(g, 0, 2 * g) for g in range(4, 8)]
    run = toy_run(steps=6, max_staleness=2, checkpoints={"resume": str(folder)})
    second = FakeRun(tmp_path / "second", run, trainers=[FakeTrainer(version=2)])
    second.go()
    assert sorted(first.trained_groups() + second.trained_groups()) == list(range(12))
    asked = {request.group_id: request.carried for request in second.environments[0].asked}
    assert asked == {entry.group_id: entry for entry in kept} | dict.fromkeys(range(8, 12))
    assert {Path(entry.file) for entry in kept} == {folder / "in-flight" / "environment-0"}


def test_what_is_too_old_by_now_is_sampled_again(tmp_path):
    _, folder = stopped_with_groups_in_flight(tmp_path / "first")
    run = toy_run(steps=6, max_staleness=0, checkpoints={"resume": str(folder)})
    second = FakeRun(tmp_path / "second", run, trainers=[FakeTrainer(version=2)])
    second.go()
    assert {request.carried for request in second.environments[0].asked} == {None}


def test_a_worker_that_cannot_keep_what_it_has_costs_nothing_else(tmp_path):
    def full(order: KeepInFlight) -> tuple[Carried, ...]:
        raise RuntimeError("no space left on device")

    run = FakeRun(tmp_path, toy_run(checkpoints={"every": 1}), environments=[FakeEnvironment(keep=full)])
    run.go()
    folder = run.run_dir.checkpoints / "step-3"
    assert (run.state["step"], checkpoint.read(folder).in_flight) == (3, [])


def test_a_flipped_byte_in_what_is_kept_of_groups_in_flight_is_refused(tmp_path):
    _, folder = stopped_with_groups_in_flight(tmp_path / "first")
    flip(folder / "in-flight" / "environment-0")
    assert "in-flight/environment-0 is damaged: its checksum is" in refusal(tmp_path, folder)


# --- while training goes on -------------------------------------------------------------------------------------------
def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    """The rank says that it saved step 2 only once step 4 was trained: the cut is that of step 2 all the same."""
    trained = threading.Event()
    trainer = FakeTrainer(
        before_step=lambda order: trained.set() if order.batch.step == 4 else None,
        before_saved=lambda save: trained.wait(20) if save.step == 2 else None,
    )
    run = FakeRun(tmp_path, toy_run(steps=5, checkpoints={"every": 2, "keep_last": 0}), trainers=[trainer])
    run.go()
    assert trained.is_set()
    folders = checkpoint_dir.complete(run.run_dir.checkpoints)
    assert [path.name for path in folders] == ["step-2", "step-4", "step-5"]
    assert [json.loads((path / "controller.json").read_text())["step"] for path in folders] == [2, 4, 5]
    with closing(sqlite3.connect(run.run_dir.ledger)) as ledger:
        chains = dict(ledger.execute("SELECT version, chain FROM versions").fetchall())
    assert [checkpoint.read(path).chain for path in folders] == [chains[2], chains[4], chains[5]]


def test_a_rank_that_cannot_write_ends_the_run_and_the_last_checkpoint_stays(tmp_path):
    def full(save: Save) -> None:
        if save.step == 2:
            raise RuntimeError("no space left on device")

    run = FakeRun(tmp_path, toy_run(steps=5, checkpoints={"every": 1}), trainers=[FakeTrainer(before_saved=full)])
    with pytest.raises(RunError, match="no space left on device"):
        run.go()
    assert "no space left on device" in run.state["error"]
    assert [path.name for path in checkpoint_dir.complete(run.run_dir.checkpoints)] == ["step-1"]


def test_a_controller_that_cannot_write_ends_the_run(tmp_path):
    def in_the_way(save: Save) -> None:
        (Path(save.path) / "controller.json").mkdir(parents=True)

    run = FakeRun(tmp_path, toy_run(), trainers=[FakeTrainer(before_saved=in_the_way)])
    with pytest.raises(RunError, match=r"the checkpoint .*step-3 cannot be written .*Is a directory"):
        run.go()


# --- refusals ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def saved(tmp_path):
    _, folder = stopped_with_pending_groups(tmp_path / "first")
    return folder


def refusal(tmp_path: Path, folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        resumed(tmp_path / "run", folder).go()
    return str(caught.value)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    assert "step-1 is no complete checkpoint: it has no manifest.json" in refusal(tmp_path, tmp_path / "step-1")


@pytest.mark.parametrize("name", checkpoint_dir.CONTROLLER_FILES)
def test_a_flipped_byte_in_the_controllers_part(tmp_path, saved, name):
    flip(saved / name)
    assert f"{name} is damaged: its checksum is" in refusal(tmp_path, saved)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
