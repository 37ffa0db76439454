"""A run of small real processes that die, hang and refuse, under the launcher of this machine."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from prl.compose.config import FailureSection
from prl.compose.plan import LaunchPlan, Process
from prl.run_dir import RunDir
from prl.supervise.supervisor import supervise
from prl_local.launcher import spawn

PRELUDE = """
import json, os, signal, sys, time
run, name = os.environ["RUN"], os.environ["NAME"]

def lives():
    with open(f"{run}/{name}.lives", "a") as file:
        file.write("x")
    return os.path.getsize(f"{run}/{name}.lives")

def until(condition):
    count = 0
    while not condition():
        count += 1
        os.makedirs(f"{run}/beats", exist_ok=True)
        open(f"{run}/beats/{name}", "w").write(f"{os.getpid()} {count}")
        time.sleep(0.01)

def begin():
    open(f"{run}/state.partial", "w").write(json.dumps({"status": "running", "step": 3}))
    os.replace(f"{run}/state.partial", f"{run}/state.json")

def failures():
    path = f"{run}/failures.jsonl"
    return open(path).read() if os.path.exists(path) else ""

def size(path):
    return os.path.getsize(path) if os.path.exists(path) else 0

life = lives()
"""
STAY = "until(lambda: False)"
DIE = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.logs(1).mkdir(parents=True)
    return run


def process(run_dir: RunDir, name: str, script: str) -> Process:
    role, _, index = name.rpartition("-")
    argv = (sys.executable, "-c", PRELUDE + textwrap.dedent(script))
    env = {"RUN": str(run_dir.path), "NAME": name}
    return Process(role=role, index=int(index), argv=argv, env=env, cpus=1, gpus=0)


def run(run_dir: RunDir, scripts: dict[str, str], **failures: Any) -> int:
    processes = tuple(process(run_dir, name, script) for name, script in scripts.items())
    section = FailureSection(**{"backoff": 0.0, **failures})
    return supervise(LaunchPlan(run_dir=run_dir, processes=processes, failures=section), spawn, grace=0.3)


def lives(run_dir: RunDir, name: str) -> int:
    return (run_dir.path / f"{name}.lives").stat().st_size


def state(run_dir: RunDir) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(run_dir.state.read_text())
    return content


def casualties(run_dir: RunDir) -> list[dict[str, Any]]:
    lines = run_dir.failures.read_text().splitlines() if run_dir.failures.exists() else []
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", ["engine-0", "environment-0"])
def test_a_process_that_is_killed_is_started_again_alone(run_dir: RunDir, name: str) -> None:
    controller = f"until(lambda: size(f'{{run}}/{name}.lives') == 2)"
    assert run(run_dir, {"controller-0": controller, name: f"{STAY} if life == 2 else {DIE}"}) == 0
    assert (lives(run_dir, name), lives(run_dir, "controller-0")) == (2, 1)
    (line,) = casualties(run_dir)
    assert f"{line['role']}-{line['index']}" == name
    assert (line["sentence"], line["done"]) == (f"{name} was ended by SIGKILL", "started again")
    assert len(json.loads(run_dir.processes.read_text())) == 2


def test_what_keeps_dying_is_given_up_with_its_reason(run_dir: RunDir) -> None:
    assert run(run_dir, {"controller-0": STAY, "engine-0": DIE}, restarts=2) == 1
    assert lives(run_dir, "engine-0") == 3
    assert state(run_dir)["status"] == "failed"
    assert state(run_dir)["error"].startswith(
        "engine-0 was ended by SIGKILL; it was restarted 2 times while the run trained fewer than 50 steps"
    )


@pytest.mark.parametrize(("minimum", "code"), [(1, 0), (2, 1)])
def test_a_run_goes_on_without_an_engine_as_long_as_enough_are_left(run_dir: RunDir, minimum: int, code: int) -> None:
    scripts = {
        "controller-0": "begin()\nuntil(lambda: 'goes on without it' in failures())",
        "engine-0": f"until(lambda: size(f'{{run}}/state.json'))\n{DIE}",
        "engine-1": STAY,
    }
    assert run(run_dir, scripts, restarts=1, minimum_engines=minimum) == code
    assert (lives(run_dir, "engine-0"), lives(run_dir, "engine-1")) == (2, 1)


def test_a_process_that_hangs_is_killed_and_started_again(run_dir: RunDir) -> None:
    hang = "until(lambda: os.path.exists(f'{run}/beats/engine-0'))\nos.kill(os.getpid(), signal.SIGSTOP)"
    scripts = {
        "controller-0": "until(lambda: size(f'{run}/engine-0.lives') == 2)",
        "engine-0": f"if life == 1:\n{textwrap.indent(hang, '    ')}\n{STAY}",
    }
    assert run(run_dir, scripts, silence=4.0) == 0
    (line,) = casualties(run_dir)
    assert line["sentence"] == "engine-0 was killed: engine-0 gave no sign of life for 4 s"


def test_a_rank_that_hangs_is_its_trainer_s_failure(run_dir: RunDir) -> None:
    rank = "open(f'{run}/beats/trainer-rank-1', 'w').write('1 1')"
    scripts = {
        "controller-0": STAY,
        "trainer-0": f"os.makedirs(f'{{run}}/beats', exist_ok=True)\n{rank}\n{STAY}",
    }
    assert run(run_dir, scripts, silence=3.0, restarts=0) == 1
    assert state(run_dir)["error"].startswith("trainer-0 was killed: trainer-rank-1 gave no sign of life for 3 s")


def test_a_loop_that_hangs_is_its_controller_s_failure(run_dir: RunDir) -> None:
    loop = "os.makedirs(f'{run}/beats', exist_ok=True)\nopen(f'{run}/beats/controller-loop', 'w').write('1 1')"
    assert run(run_dir, {"controller-0": f"begin()\n{loop}\n{STAY}"}, silence=3.0, restarts=0) == 137
    error = "controller-0 was killed: controller-loop gave no sign of life for 3 s"
    assert state(run_dir)["error"].startswith(error)


def test_a_process_that_the_controller_condemns_is_started_again(run_dir: RunDir) -> None:
    condemn = """
        until(lambda: os.path.exists(f"{run}/beats/engine-0"))
        open(f"{run}/beats/engine-0.condemned", "w").write("it takes no weights")
        until(lambda: size(f"{run}/engine-0.lives") == 2)
    """
    assert run(run_dir, {"controller-0": condemn, "engine-0": STAY}) == 0
    assert casualties(run_dir)[0]["sentence"] == "engine-0 was killed: it takes no weights"


def test_a_process_that_says_why_it_will_not_is_not_asked_again(run_dir: RunDir) -> None:
    refuse = "begin()\nprint('no such file', file=sys.stderr)\nsys.exit(1)"
    assert run(run_dir, {"controller-0": STAY, "environment-0": refuse}) == 1
    assert lives(run_dir, "environment-0") == 1
    assert "no such file" in state(run_dir)["error"]


@pytest.mark.parametrize(("begins", "expected"), [("", 1), ("begin()", 2)])
def test_an_unforeseen_end_is_a_mistake_before_the_run_is_under_way(
    run_dir: RunDir, begins: str, expected: int
) -> None:
    broken = "until(lambda: size(f'{run}/go'))\nprint('KeyError', file=sys.stderr)\nsys.exit(70)"
    reborn = "until(lambda: size(f'{run}/engine-0.lives') == 2)"
    scripts = {
        "controller-0": f"{begins}\nopen(f'{{run}}/go', 'w').write('x')\n{reborn}",
        "engine-0": f"{STAY} if life == 2 else None\n{broken}",
    }
    assert run(run_dir, scripts) == (0 if expected == 2 else 1)
    assert lives(run_dir, "engine-0") == expected


def test_a_run_that_cannot_be_resumed_says_so(run_dir: RunDir) -> None:
    """There is no run.toml here."""
    assert run(run_dir, {"controller-0": STAY, "trainer-0": DIE}) == 1
    assert state(run_dir)["status"] == "failed"
    assert state(run_dir)["error"].startswith("trainer-0 was ended by SIGKILL; the run cannot go on by itself: ")
    (supervisor,) = json.loads(run_dir.processes.read_text())
    assert (supervisor["role"], supervisor["pid"]) == ("launcher", os.getpid())


def test_a_run_that_was_asked_to_stop_is_not_begun_again(run_dir: RunDir) -> None:
    assert run(run_dir, {"controller-0": STAY, "trainer-0": f"open(f'{{run}}/stop', 'w')\n{DIE}"}) == 1
    assert state(run_dir)["error"].startswith("trainer-0 was ended by SIGKILL while the run was asked to stop")
