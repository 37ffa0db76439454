"""Whole runs of the controller, around workers that speak real messages through the real hub."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest
from prl.errors import CheckpointError, InfrastructureError
from prl.messages import RunGroup, TrainStep

from tests.dispatch.fakes import (
    EVAL_TASKS,
    FakeEnvironment,
    FakeRun,
    FakeTrainer,
    answer,
    toy_run,
)


def staleness(order: TrainStep) -> list[int]:
    """Of every sampled token of a step."""
    micro_batches = [micro for rank in order.batch.ranks for micro in rank]
    return np.concatenate([order.batch.version - m.versions[m.sampled] for m in micro_batches]).tolist()


# --- an ordinary run --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def ordinary(tmp_path_factory) -> FakeRun:
    run = FakeRun(tmp_path_factory.mktemp("ordinary"), toy_run(steps=5, max_staleness=1))
    run.go()
    return run


def test_a_run_reaches_its_end(ordinary):
    state = ordinary.state
    assert (state["status"], state["step"], state["steps"], state["version"]) == ("finished", 5, 5, 5)
    assert state["error"] == ""
    assert state["metrics"]["step"] == 5
    assert not ordinary.run_dir.controller.exists()


def test_every_step_trains_its_version(ordinary):
    (trainer,) = ordinary.trainers
    assert [(o.batch.step, o.batch.version, o.batch.phase) for o in trainer.steps] == [
        (s + 1, s, "rl") for s in range(5)
    ]
    assert all(order.learning_rate == 0.5 and order.publish for order in trainer.steps)


def test_every_group_is_trained_once(ordinary):
    assert ordinary.trained_groups() == list(range(10))
    assert ordinary.tracker.trained == list(range(10))


def test_engines_get_every_version_they_need_and_old_ones_are_retired(ordinary):
    (engine,), (trainer,) = ordinary.engines, ordinary.trainers
    assert engine.committed[0] == 0
    assert engine.committed[-1] == 5
    assert engine.committed == sorted(set(engine.committed))
    assert trainer.retired == [0, 1, 2, 3, 4]
    assert engine.closed


def test_lifecycle_hooks_are_called_in_order(ordinary):
    hooks = ordinary.hooks
    assert hooks.calls[0][0] == "prl_run_start"
    assert hooks.calls[-1][0] == "prl_run_end"
    assert hooks.calls[-1][1]["error"] is None
    assert [c["version"] for c in hooks.named("prl_step_end")] == [1, 2, 3, 4, 5]
    assert sorted(c["group"].group_id for c in hooks.named("prl_group_done")) == list(range(10))
    assert hooks.named("prl_weights_published")[-1]["version"] == 5
    (saved,) = hooks.named("prl_checkpoint_saved")
    assert saved["path"] == ordinary.run_dir.checkpoints / "step-5"


def test_metrics_of_a_step(ordinary):
    lines = ordinary.lines("rl")
    assert [(line["step"], line["version"]) for line in lines] == [(s, s) for s in range(1, 6)]
    for line in lines:
        assert line["reward/mean"] == line["reward/toy"] == line["accuracy/mean"] == 0.5
        assert (line["tokens/trained"], line["tokens/sampled"]) == (40, 24)
        assert line["length/mean"] == 3.0
        assert sum(line.get(f"staleness/{k}", 0.0) for k in range(2)) == pytest.approx(1.0)
        assert line["loss/rl"] == pytest.approx(8 * (0 + 1 + 2 + 3 + 4) / 24)
        assert line["grad_norm"] == 1.0
        assert {"queue/ready", "queue/batches", "queue/trackers", "time/step", "idle/trainer"} <= line.keys()
    assert lines[-1]["progress/seconds_left"] == 0.0
    assert [line["step"] for line in ordinary.tracker.lines] == [1, 2, 3, 4, 5]


def test_rollouts_are_written_with_what_a_reader_wants(ordinary):
    row = ordinary.trained()[1]
    assert (row["step"], row["group_id"], row["member"], row["attempt"]) == (1, 0, "1", 0)
    assert row["task"]["environment"] == "toy"
    assert (row["reward"], row["advantage"], row["metrics"]) == (1.0, 0.5, {"accuracy": 1.0})
    assert (row["versions"], row["version_tokens"], row["length"], row["stop"]) == ([0], [3], 3, ["stop"])
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]


def test_sampling_seeds_are_far_apart(ordinary):
    seeds = [request.sampling.seed for request in ordinary.environments[0].asked]
    assert len({seed >> 16 for seed in seeds}) == 10


# --- staleness --------------------------------------------------------------------------------------------------------
def test_with_bound_zero_every_token_is_of_the_version_it_trains(tmp_path):
    run = FakeRun(tmp_path, toy_run(steps=6, max_staleness=0))
    run.go()
    assert {s for order in run.trainers[0].steps for s in staleness(order)} == {0}
    assert [request.version for request in run.environments[0].asked] == [v for v in range(6) for _ in range(2)]


def test_generation_runs_ahead_up_to_the_bound_and_never_beyond(tmp_path):
    """The first step waits until as much is asked for as two versions ahead allow: three steps' worth."""
    ahead = threading.Event()
    environment = FakeEnvironment()

    def reply(request: RunGroup):
        if len(environment.asked) == 6:
            ahead.set()
        return answer(request)

    def wait_for_generation(order: TrainStep) -> None:
        if order.batch.step == 1 and not ahead.wait(timeout=20):
            raise RuntimeError("generation did not run ahead")

    environment.reply = reply
    trainer = FakeTrainer(before_step=wait_for_generation)
    run = FakeRun(tmp_path, toy_run(steps=8, max_staleness=2), environments=[environment], trainers=[trainer])
    run.go()
    assert [max(staleness(order)) for order in trainer.steps[:3]] == [0, 1, 2]
    assert max(max(staleness(order)) for order in trainer.steps) == 2
    assert max(line["staleness/max"] for line in run.lines("rl")) == 2


def test_a_group_that_new_weights_make_stale_is_cut_and_tried_again(tmp_path):
    environment = FakeEnvironment(
        reply=lambda request: None if (request.group_id, request.attempt) == (0, 0) else answer(request)
    )
    run = FakeRun(tmp_path, toy_run(steps=5, max_staleness=1), environments=[environment])
    run.go()
    attempts = [request for request in environment.asked if request.group_id == 0]
    assert [request.attempt for request in attempts] == [0, 1]
    assert attempts[0].request in environment.cancelled
    assert attempts[0].task == attempts[1].task
    assert attempts[0].sampling.seed != attempts[1].sampling.seed
    assert Counter(run.trained_groups())[0] == 1
    assert {row["attempt"] for row in run.trained() if row["group_id"] == 0} == {1}
    assert sum(line.get("dropped/stale", 0) for line in run.lines("rl")) >= 1


# --- warm-up, ranks ---------------------------------------------------------------------------------------------------
def test_a_warm_up_trains_demonstrations_and_publishes_once(tmp_path):
    run = FakeRun(tmp_path, toy_run(warmup=3, steps=2, max_staleness=0))
    run.go()
    orders = run.trainers[0].steps
    assert [(o.batch.step, o.batch.phase, o.publish) for o in orders] == [
        (1, "warmup", False),
        (2, "warmup", False),
        (3, "warmup", True),
        (4, "rl", True),
        (5, "rl", True),
    ]
    assert {o.learning_rate for o in orders[:3]} == {0.25}
    assert all(set(o.batch.token_counts) == {"ce"} for o in orders[:3])
    tokens = {int(t) for o in orders[:3] for rank in o.batch.ranks for m in rank for t in m.tokens}
    assert len(tokens) == 15  # five demonstrations a step, each of another task
    assert run.engines[0].committed == [0, 3, 4, 5]
    assert {request.version for request in run.environments[0].asked} == {3, 4}
    assert [line["loss/ce"] > 0 for line in run.lines("warmup")] == [True] * 3
    assert run.state["steps"] == 5


def test_every_rank_gets_its_share_and_losses_are_added_up(tmp_path):
    run = FakeRun(tmp_path, toy_run(trainer={"ranks": 2}), trainers=[FakeTrainer(), FakeTrainer()])
    run.go()
    first, second = (trainer.steps for trainer in run.trainers)
    for left, right in zip(first, second, strict=True):
        assert left.batch.token_counts == right.batch.token_counts == {"rl": 24}
        assert len(left.batch.ranks) == len(right.batch.ranks) == 1
        assert len(left.batch.ranks[0]) == len(right.batch.ranks[0])
        assert sum(len(m.tokens) for o in (left, right) for m in o.batch.ranks[0]) == 40
    assert [line["loss/rl"] for line in run.lines("rl")] == pytest.approx([80 / 24] * 3)


def test_ranks_that_hold_another_version_are_refused(tmp_path):
    run = FakeRun(tmp_path, toy_run(), trainers=[FakeTrainer(version=4)])
    with pytest.raises(CheckpointError, match="trainer-0 starts from version 4, the controller from version 0"):
        run.go()


# --- evaluation -------------------------------------------------------------------------------------------------------
def test_held_out_tasks_are_evaluated_before_during_and_after(tmp_path):
    run = FakeRun(tmp_path, toy_run(steps=4, max_staleness=0, evaluation={"every": 2, "tasks": 5, "temperature": 0.25}))
    run.go()
    lines = run.lines("eval")
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert [line["eval/version"] for line in lines] == [0, 2, 4]
    assert all(line["eval/toy/accuracy"] == line["eval/toy/reward"] == 0.0 for line in lines)
    asked = [request for request in run.environments[0].asked if request.task.split == "eval"]
    assert Counter(request.task.index for request in asked) == dict.fromkeys(range(5), 3)
    assert {(request.size, request.sampling.temperature) for request in asked} == {(1, 0.25)}
    assert all(request.group_id < 0 for request in asked)
    assert min(run.trained_groups()) == 0
    assert run.state["metrics"]["eval/version"] == 4


def test_a_task_whose_evaluation_fails_is_tried_again_and_then_left_out(tmp_path):
    def reply(request: RunGroup):
        broken = request.task.split == "eval" and (request.task.index == 2 or request.attempt == 0)
        return answer(request, failed=1 if broken else 0)

    run = FakeRun(
        tmp_path,
        toy_run(steps=1, evaluation={"every": 1, "tasks": 100}, rollouts={"retries": 1}),
        environments=[FakeEnvironment(reply=reply)],
    )
    run.go()
    for line in run.lines("eval"):
        assert line["eval/toy/lost"] == 1
        assert line["eval/toy/reward"] == 0.0
    asked = [request for request in run.environments[0].asked if request.task.split == "eval"]
    assert len(asked) == 2 * 2 * EVAL_TASKS


# --- cheap environments -----------------------------------------------------------------------------------------------
def test_a_cheap_environment_runs_inside_the_controller(tmp_path, monkeypatch):
    asked: list[RunGroup] = []
    closed: list[bool] = []

    class Runner:
        def __init__(self, composition, run, token, *, columns, environments):
            assert environments == ("toy",)

        def sizes(self):
            return {"toy/train": 50, "toy/eval": 3}

        async def run(self, request: RunGroup):
            asked.append(request)
            if request.group_id == 0 and request.attempt == 0:
                raise InfrastructureError("out of luck")
            return answer(request)

        async def keep_in_flight(self, path, version):
            return ()

        async def aclose(self):
            closed.append(True)

    monkeypatch.setattr("prl.dispatch.parts.GroupRunner", Runner)
    monkeypatch.setattr("prl.dispatch.parts.environment_names", lambda composition, *, cheap: ("toy",) if cheap else ())
    run = FakeRun(tmp_path, toy_run(evaluation={"every": 5}), environments=[])
    run.go()
    assert sorted(run.trained_groups()) == list(range(6))
    assert len([request for request in asked if request.task.split == "eval"]) == 6
    assert closed == [True]


def test_the_controller_imports_no_torch():
    program = "import sys, prl.dispatch.controller; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
