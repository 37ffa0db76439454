"""What fails around the controller, and what becomes of the run: tried again, left out, or ended with a sentence."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import attrs
import numpy as np
import pytest
from prl.dispatch import controller
from prl.errors import RunError
from prl.messages import Failed, RunGroup, TrainStep
from prl.types import Group

from tests.dispatch.fakes import FakeComposition, FakeEngine, FakeEnvironment, FakeRun, FakeTrainer, answer, toy_run


# --- rollouts ---------------------------------------------------------------------------------------------------------
def test_failures_are_tried_again_and_never_become_a_reward(tmp_path):
    def reply(request: RunGroup):
        first = request.attempt == 0
        match request.group_id:
            case 1 if first:
                return Failed(error="the environment has no such file")
            case 2 if first:
                return answer(request, failed=4, where="engine")
            case 3 if first:
                return answer(request, failed=3)
            case 4:
                return answer(request, failed=2)
        return answer(request)

    run = FakeRun(tmp_path, toy_run(steps=4), environments=[FakeEnvironment(reply=reply)])
    run.go()
    assert sorted(run.trained_groups()) == list(range(8))
    sizes = Counter(row["group_id"] for row in run.trained())
    assert (sizes[3], sizes[4]) == (4, 2)
    assert {row["attempt"] for row in run.trained() if row["group_id"] in (1, 2, 3)} == {1}
    dropped = Counter()
    for line in run.lines("rl"):
        dropped.update({name: count for name, count in line.items() if name.startswith("dropped/")})
    assert dropped["dropped/environment"] == 2
    assert dropped["dropped/engine"] == 1
    assert all(row["reward"] == int(row["member"]) % 2 for row in run.trained())


def test_garbage_costs_the_worker_an_attempt_and_nobody_else_anything(tmp_path):
    def reply(request: RunGroup):
        group = answer(request)
        if request.attempt == 0:
            match request.group_id:
                case 1:
                    return attrs.evolve(group, group_id=0)
                case 2:
                    return spoiled(group, versions=np.full(5, 1000, dtype=np.int32))
                case 3:
                    return spoiled(group, logprobs=np.zeros(1, dtype=np.float32))
                case 4:
                    return spoiled(group, reward=float("nan"))
                case 5:
                    return spoiled(group, messages=({"role": "user", "content": b"\xff"},))
        return group

    def spoiled(group: Group, **changes: Any) -> Group:
        return attrs.evolve(group, rollouts=(attrs.evolve(group.rollouts[0], **changes), *group.rollouts[1:]))

    run = FakeRun(tmp_path, toy_run(steps=4, max_staleness=3), environments=[FakeEnvironment(reply=reply)])
    run.go()
    assert sorted(run.trained_groups()) == list(range(8))
    assert {row["group_id"] for row in run.trained() if row["attempt"] == 1} == {1, 2, 3, 4, 5}
    assert sum(line.get("dropped/environment", 0) for line in run.lines("rl")) == 5


def test_a_task_that_always_fails_is_given_up_with_its_reason(tmp_path):
    environment = FakeEnvironment(reply=lambda r: answer(r, failed=4) if r.group_id == 0 else answer(r))
    run = FakeRun(tmp_path, toy_run(steps=3, rollouts={"retries": 2}), environments=[environment])
    run.go()
    assert [r.attempt for r in environment.asked if r.group_id == 0] == [0, 1, 2]
    assert run.trained_groups() == [1, 2, 3, 4, 5, 6]
    assert sum(line.get("dropped/given_up", 0) for line in run.lines("rl")) == 1


def test_a_group_that_takes_too_long_is_tried_again(tmp_path):
    environment = FakeEnvironment(reply=lambda r: None if r.attempt == 0 and r.group_id == 1 else answer(r))
    run = FakeRun(tmp_path, toy_run(steps=1, max_staleness=0, rollouts={"timeout": 0.05}), environments=[environment])
    run.go()
    assert run.trained_groups() == [0, 1]
    assert run.lines("rl")[0]["dropped/timeout"] == 1


def test_a_run_whose_groups_are_all_lost_fails(tmp_path):
    run = FakeRun(tmp_path, toy_run(steps=1), environments=[FakeEnvironment(reply=lambda r: answer(r, failed=4))])
    with pytest.raises(RunError, match=r"32 of the last 32 groups were lost .* failures.share = 0.5 .*: .* broke"):
        run.go()
    assert run.state["status"] == "failed"


def test_work_is_shared_among_engines_and_environment_workers(tmp_path):
    run = FakeRun(
        tmp_path,
        toy_run(steps=4, max_staleness=3, engines=2, rollouts={"workers": 2}),
        environments=[FakeEnvironment(), FakeEnvironment()],
        engines=[FakeEngine(), FakeEngine()],
    )
    run.go()
    asked = [request for environment in run.environments for request in environment.asked]
    assert {request.engine for request in asked} == {"engine-0", "engine-1"}
    assert all(environment.asked for environment in run.environments)


# --- workers ----------------------------------------------------------------------------------------------------------
def test_an_engine_that_cannot_take_new_weights_is_left_out_and_its_groups_go_elsewhere(tmp_path):
    """What was sent to engine 1 is never answered: it ends when the engine is evicted."""
    environment = FakeEnvironment(reply=lambda r: None if r.engine == "engine-1" else answer(r))
    engines = [FakeEngine(), FakeEngine()]

    def break_engine(order: TrainStep) -> None:
        engines[1].broken.add("prepare")

    run = FakeRun(
        tmp_path,
        toy_run(steps=4, max_staleness=3, engines=2),
        environments=[environment],
        trainers=[FakeTrainer(before_step=break_engine)],
        engines=engines,
    )
    run.go()
    on_broken = {request.group_id for request in environment.asked if request.engine == "engine-1"}
    assert on_broken
    assert on_broken <= {r.group_id for r in environment.asked if r.engine == "engine-0" and r.attempt == 1}
    assert engines[1].committed == [0]
    assert sum(line.get("dropped/engine", 0) for line in run.lines("rl")) == len(on_broken)
    assert Counter(run.trained_groups()).most_common(1)[0][1] == 1


def test_an_engine_that_cannot_load_the_first_weights_fails_the_run(tmp_path):
    run = FakeRun(tmp_path, toy_run(), engines=[FakeEngine(broken={"prepare"})])
    with pytest.raises(RunError, match=r"engine 0 .* cannot load the first weights: prepare is broken"):
        run.go()
    assert run.environments[0].asked == []


def test_a_trainer_that_fails_ends_the_run_with_its_sentence(tmp_path):
    def fail(order: TrainStep) -> None:
        if order.batch.step == 2:
            raise RuntimeError("the loss is not finite")

    run = FakeRun(tmp_path, toy_run(), trainers=[FakeTrainer(before_step=fail)])
    with pytest.raises(RunError, match="trainer-0 cannot go on: the loss is not finite"):
        run.go()
    assert (run.state["status"], run.state["step"]) == ("failed", 1)
    assert run.state["error"] == "trainer-0 cannot go on: the loss is not finite"
    (end,) = run.hooks.named("prl_run_end")
    assert isinstance(end["error"], RunError)
    assert run.tracker.finished == [end["error"]]


def test_main_answers_with_an_exit_code(tmp_path, capsys):
    run = FakeRun(tmp_path, toy_run(), engines=[FakeEngine(broken={"prepare"})])
    with run._threads():
        code = controller.main(FakeComposition(run.run, run.hooks, run.engines, run.tracker), run.run_dir)
    assert code == 1
    assert "cannot load the first weights" in capsys.readouterr().err


def test_a_controller_that_is_terminated_dismisses_its_workers(tmp_path):
    run = FakeRun(tmp_path, toy_run())
    run.environments = [FakeEnvironment(reply=lambda request: run.terminate())]
    with pytest.raises(asyncio.CancelledError):
        run.go()  # ends only when every worker was told to stop
    assert (run.state["status"], run.state["error"]) == ("failed", "terminated by a signal")
    (end,) = run.hooks.named("prl_run_end")
    assert isinstance(end["error"], asyncio.CancelledError)


def test_plugins_and_trackers_cannot_stop_a_run(tmp_path):
    run = FakeRun(tmp_path, toy_run(steps=6))
    run.hooks.failing |= {"prl_step_end", "prl_run_end", "prl_group_done"}
    run.tracker.broken |= {"log"}
    run.go()
    assert run.state["status"] == "finished"
    assert len(run.hooks.named("prl_step_end")) == 3  # switched off after three failures in a row
    assert run.tracker.finished == [None]


def test_a_tracker_that_cannot_start_is_the_users_mistake(tmp_path):
    run = FakeRun(tmp_path, toy_run(), environments=[], trainers=[], engines=[])
    run.tracker.broken |= {"start"}
    with pytest.raises(RunError, match="tracker fake cannot start: no start"):
        run.go()
