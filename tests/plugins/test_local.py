"""Launcher `local`: how a run ends, and that nothing is left of it."""

from __future__ import annotations

import json
import signal
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from prl.compose.config import FailureSection
from prl.compose.plan import LaunchPlan, Process
from prl.run_dir import RunDir
from prl_local import LocalConfig
from prl_local.launcher import LocalLauncher, build

WAIT = "import signal; signal.pause()"
"""A process that stays until it is told to go."""


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.logs(1).mkdir(parents=True)
    return run


def process(role: str, script: str, *, index: int = 0, **env: str) -> Process:
    argv = (sys.executable, "-c", textwrap.dedent(script))
    return Process(role=role, index=index, argv=argv, env=env, cpus=1, gpus=0)


def launch(run_dir: RunDir, *processes: Process, grace: float = 30.0) -> int:
    """Nothing is restarted: that is `prl.supervise`'s, and tested there."""
    plan = LaunchPlan(run_dir=run_dir, processes=processes, failures=FailureSection(restarts=0))
    return LocalLauncher(grace=grace).launch(plan)


def state(run_dir: RunDir) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(run_dir.state.read_text())
    return content


def gone(run_dir: RunDir) -> bool:
    """Every process that was started has ended and was waited for."""
    pids = [entry["pid"] for entry in json.loads(run_dir.processes.read_text())]
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def log(run_dir: RunDir, name: str) -> str:
    return (run_dir.logs() / f"{name}.log").read_text()


def test_a_run_that_ends_well(run_dir: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    say = "import os, sys; print('out', os.environ['NAME']); print('err', file=sys.stderr)"
    code = launch(
        run_dir,
        process("controller", say, NAME="controller"),
        process("engine", say, NAME="one"),
        process("engine", say, index=1, NAME="two"),
    )
    assert code == 0
    assert capfd.readouterr().out == "out controller\n"
    assert log(run_dir, "controller-0") == "err\n"
    assert sorted(log(run_dir, "engine-1").splitlines()) == ["err", "out two"]
    entries = json.loads(run_dir.processes.read_text())
    assert [(e["role"], e["index"], Path(e["log"]).name) for e in entries] == [
        ("controller", 0, "controller-0.log"),
        ("engine", 0, "engine-0.log"),
        ("engine", 1, "engine-1.log"),
    ]
    assert not run_dir.state.exists()
    assert gone(run_dir)


def test_children_lead_sessions_of_their_own(run_dir: RunDir) -> None:
    assert launch(run_dir, process("controller", "import os, sys; sys.exit(os.getsid(0) != os.getpid())")) == 0


def test_what_stays_after_the_controller_is_ended(run_dir: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(run_dir, process("controller", ""), process("engine", WAIT), grace=0.2) == 0
    assert "engine-0 did not end in time" in capfd.readouterr().err
    assert gone(run_dir)


def test_a_run_that_is_stopped_before_it_began_waits_for_nobody(
    run_dir: RunDir, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir.stop.touch()
    assert launch(run_dir, process("controller", ""), process("engine", WAIT)) == 0
    assert capfd.readouterr().err == ""
    assert gone(run_dir)


def test_what_ignores_sigterm_is_killed(run_dir: RunDir) -> None:
    deaf = """
        import os, signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open(os.environ["READY"], "w").close()
        while True:
            signal.pause()
    """
    ready = str(run_dir.path / "ready")
    wait = "import os, time\nwhile not os.path.exists(os.environ['READY']): time.sleep(0.01)"
    code = launch(run_dir, process("engine", deaf, READY=ready), process("controller", wait, READY=ready), grace=0.2)
    assert code == 0
    assert gone(run_dir)


@pytest.mark.parametrize(("exit_code", "expected"), [(1, 1), (2, 1), (3, 3)])
def test_another_process_that_fails_ends_the_run(
    run_dir: RunDir, capfd: pytest.CaptureFixture[str], exit_code: int, expected: int
) -> None:
    run_dir.write_json(run_dir.state, {"status": "running", "step": 4})
    failing = f"import sys; print('engine needs more', file=sys.stderr); sys.exit({exit_code})"
    assert launch(run_dir, process("controller", WAIT), process("engine", failing)) == expected
    told = capfd.readouterr().err
    assert f"engine-0 exited with code {exit_code}" in told
    assert "engine needs more" in told
    assert str(run_dir.logs() / "engine-0.log") in told
    assert (state(run_dir)["status"], state(run_dir)["step"]) == ("failed", 4)
    assert "engine needs more" in state(run_dir)["error"]
    assert gone(run_dir)


def test_a_signal_that_ended_a_process_is_named(run_dir: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert launch(run_dir, process("controller", WAIT), process("trainer", killed)) == 1
    assert "trainer-0 was ended by SIGKILL" in capfd.readouterr().err


def test_a_worker_that_is_done_does_not_end_the_run(run_dir: RunDir) -> None:
    wait = "import os, time\nwhile not os.path.exists(os.environ['DONE']): time.sleep(0.01)"
    done = str(run_dir.path / "done")
    quick = "import os; open(os.environ['DONE'], 'w').close()"
    assert launch(run_dir, process("controller", wait, DONE=done), process("environment", quick, DONE=done)) == 0


def test_a_controller_that_fails_is_the_runs_exit_code(run_dir: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    failing = "import sys; print('no engine answered', file=sys.stderr); sys.exit(2)"
    assert launch(run_dir, process("controller", failing), process("engine", WAIT)) == 2
    assert "no engine answered" in capfd.readouterr().err
    assert state(run_dir)["status"] == "failed"
    assert gone(run_dir)


def test_what_the_controller_said_of_its_failure_is_kept(run_dir: RunDir) -> None:
    run_dir.write_json(run_dir.state, {"status": "failed", "error": "its own words"})
    assert launch(run_dir, process("controller", "raise SystemExit(1)")) == 1
    assert state(run_dir)["error"] == "its own words"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_asks_the_controller_to_stop(run_dir: RunDir, number: signal.Signals) -> None:
    controller = f"""
        import os, time
        os.kill(os.getppid(), {int(number)})
        while not os.path.exists({str(run_dir.stop)!r}):
            time.sleep(0.01)
        raise SystemExit(7)
    """
    before = signal.getsignal(number)
    assert launch(run_dir, process("controller", controller)) == 7
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_everything(run_dir: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    controller = f"""
        import os, signal, time
        os.kill(os.getppid(), signal.SIGINT)
        while not os.path.exists({str(run_dir.stop)!r}):
            time.sleep(0.01)
        os.kill(os.getppid(), signal.SIGINT)
        signal.pause()
    """
    assert launch(run_dir, process("controller", controller), process("engine", WAIT)) == 130
    assert "ending every process now" in capfd.readouterr().err
    assert state(run_dir)["status"] == "stopped"
    assert gone(run_dir)


def test_rendering_shows_every_process_and_starts_none(run_dir: RunDir) -> None:
    launcher = build(LocalConfig(), run_dir.path)
    plan = LaunchPlan(
        run_dir=run_dir,
        processes=(process("controller", "x = 1", OMP_NUM_THREADS="1"), process("trainer", "", OMP_NUM_THREADS="4")),
    )
    lines = launcher.render(plan).splitlines()
    assert len(lines) == 2
    assert lines[0].split()[0] == "controller-0"
    assert "OMP_NUM_THREADS=4" in lines[1]
    assert not run_dir.processes.exists()
