"""Runs that are stopped, saved and continued."""

from __future__ import annotations

import json

import pytest
from prl.errors import CheckpointError
from prl.messages import TrainStep

from tests.dispatch.fakes import FakeEnvironment, FakeRun, FakeTrainer, toy_run


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
    assert (run.run_dir.checkpoints / "step-7" / "trainer-4").read_text() == "7"


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
        assert asked(second) == asked(whole)[max(0, stop - 3) * 2 :]
        assert demonstrated(second) == demonstrated(whole)[stop:]
        assert second.state["step"] == 9


def test_a_resumed_run_loses_no_task_and_trains_none_twice(tmp_path):
    """Stopped with groups in flight, ready, and in a batch that was formed ahead."""
    first = FakeRun(tmp_path / "first", toy_run(steps=10, max_staleness=3))

    def stop_in_step_four(order: TrainStep) -> None:
        if order.batch.step == 4:
            first.run_dir.stop.touch()
            first.until(lambda state: state["status"] == "stopping")

    first.trainers = [FakeTrainer(before_step=stop_in_step_four)]
    first.go()
    assert (first.state["status"], first.state["step"]) == ("stopped", 4)
    state = json.loads((first.run_dir.checkpoints / "step-4" / "controller.json").read_text())
    assert len(state["feed"]["outstanding"]) >= 2
    second = FakeRun(
        tmp_path / "second",
        toy_run(steps=10, max_staleness=3, checkpoints={"resume": str(first.run_dir.checkpoints / "step-4")}),
        trainers=[FakeTrainer(version=4)],
    )
    second.go()
    assert sorted(first.trained_groups() + second.trained_groups()) == list(range(20))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "is no complete checkpoint"),
        ("{", "is damaged"),
        ('{"format": 99}', "has format 99, this prl reads 2"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path, content, sentence):
    folder = tmp_path / "step-1"
    folder.mkdir()
    if content is not None:
        (folder / "controller.json").write_text(content)
    run = FakeRun(tmp_path / "run", toy_run(checkpoints={"resume": str(folder)}))
    with pytest.raises(CheckpointError, match=sentence):
        run.go()
