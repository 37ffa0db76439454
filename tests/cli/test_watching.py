"""`prl status`, `prl logs` and `prl stop`, on run directories written by hand."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prl.cli import logs, main
from prl.cli.runs import alive, find_run, is_over
from prl.errors import UserError
from prl.run_dir import RunDir


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """`runs/demo` below the working directory, with two logs."""
    monkeypatch.chdir(tmp_path)
    run = RunDir("runs/demo")
    run.logs(1).mkdir(parents=True)
    run.config.write_text("")
    (run.logs(1) / "engine-0.log").write_text("one\ntwo\n")
    (run.logs(1) / "controller-0.log").write_text("three\nfour")
    return run


@pytest.fixture
def sleeper(run_dir: RunDir) -> Iterator[subprocess.Popen[bytes]]:
    """A living process whose command line names the run."""
    script = "import sys; print(flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(run_dir.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def started(run_dir: RunDir, *pids: int, host: str = "") -> None:
    run_dir.write_json(
        run_dir.processes,
        [
            {
                "role": "engine",
                "index": index,
                "pid": pid,
                "host": host or socket.gethostname(),
                "log": str(run_dir.logs() / f"engine-{index}.log"),
                "started": time.time(),
            }
            for index, pid in enumerate(pids)
        ],
    )


def state(run_dir: RunDir, **content: Any) -> None:
    run_dir.write_json(run_dir.state, content)


def test_a_run_is_found_by_path_by_name_and_as_the_newest(run_dir: RunDir) -> None:
    older = RunDir("runs/older")
    older.path.mkdir()
    older.config.write_text("")
    os.utime(older.config, (1, 1))
    assert find_run(None) == run_dir
    assert find_run("older") == older
    assert find_run("runs/older") == older
    with pytest.raises(UserError, match="nowhere is not a run directory"):
        find_run("nowhere")
    with pytest.raises(UserError, match=f"runs is a folder of runs: name one of .*{run_dir.path.name}.*older"):
        find_run("runs")


def test_without_runs_there_is_nothing_to_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 2


def test_life_is_told_by_the_command_line(run_dir: RunDir, sleeper: subprocess.Popen[bytes]) -> None:
    def entry(pid: int, host: str = socket.gethostname()) -> dict[str, Any]:
        return {"pid": pid, "host": host}

    assert alive(entry(sleeper.pid), run_dir)
    assert not alive(entry(os.getpid()), run_dir)
    assert alive(entry(1, host="elsewhere.example"), run_dir)
    sleeper.kill()
    sleeper.wait()
    assert not alive(entry(sleeper.pid), run_dir)


def test_a_run_is_over_when_it_says_so_or_nothing_lives(run_dir: RunDir, sleeper: subprocess.Popen[bytes]) -> None:
    assert not is_over(run_dir)
    started(run_dir, sleeper.pid)
    state(run_dir, status="running")
    assert not is_over(run_dir)
    state(run_dir, status="finished")
    assert is_over(run_dir)
    state(run_dir, status="running")
    started(run_dir, os.getpid())
    assert is_over(run_dir)


def test_status_shows_progress_metrics_and_processes(
    run_dir: RunDir, sleeper: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    started(run_dir, sleeper.pid, os.getpid())
    metrics = {"reward/mean": 0.53125, "eval/toy/accuracy": 0.25, "queue/x": 3}
    engines = ["http://127.0.0.1:8001", "http://127.0.0.1:8002"]
    progress = {"step": 12, "steps": 100, "version": 14, "updated": time.time()}
    state(run_dir, status="running", **progress, metrics=metrics, engines=engines)
    assert main(["status", "demo"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["status", "running"] in rows
    assert ["step", "12", "of", "100,", "version", "14"] in rows
    assert ["engines", "http://127.0.0.1:8001/v1,", "http://127.0.0.1:8002/v1"] in rows
    assert ["reward/mean", "0.5312"] in rows
    assert ["eval/toy/accuracy", "0.25"] in rows
    assert not any("queue/x" in row for row in rows)
    host = socket.gethostname()
    assert ["engine-0", "pid", str(sleeper.pid), host, "alive", "logs/attempt-1/engine-0.log"] in rows
    assert ["engine-1", "pid", str(os.getpid()), host, "gone", "logs/attempt-1/engine-1.log"] in rows


@pytest.mark.parametrize(
    ("content", "stop", "expected"),
    [
        ({}, False, "starting"),
        ({"status": "running"}, True, "running (asked to stop)"),
        ({"status": "failed", "error": "engine-0 exited"}, True, "failed"),
    ],
)
def test_status_of_other_states(
    run_dir: RunDir, capsys: pytest.CaptureFixture[str], content: dict[str, Any], stop: bool, expected: str
) -> None:
    state(run_dir, **content)
    if stop:
        run_dir.stop.touch()
    main(["status"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"status {expected}" in lines
    assert ("error engine-0 exited" in lines) == ("error" in content)


def test_a_killed_run_is_not_called_running(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    started(run_dir, os.getpid())
    state(run_dir, status="running")
    main(["status"])
    assert "it was killed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["controller-0 | three", "controller-0 | four", "engine-0     | one", "engine-0     | two"]),
        (["demo", "engine"], ["engine-0 | one", "engine-0 | two"]),
        (["controller-0"], ["controller-0 | three", "controller-0 | four"]),
    ],
)
def test_logs_are_prefixed_and_chosen_by_role(
    run_dir: RunDir, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: list[str]
) -> None:
    assert main(["logs", *arguments]) == 0
    assert capsys.readouterr().out.splitlines() == expected


def test_logs_of_a_role_that_is_not_there(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", "trainer"]) == 2
    assert "there are logs of controller-0, engine-0" in capsys.readouterr().err


def test_following_goes_on_until_the_run_is_over(run_dir: RunDir) -> None:
    state(run_dir, status="running")
    lines = logs.follow(run_dir, "engine")
    assert [next(lines), next(lines)] == ["engine-0 | one", "engine-0 | two"]
    with (run_dir.logs() / "engine-0.log").open("a") as file:
        file.write("three\nfou")
    assert next(lines) == "engine-0 | three"
    with (run_dir.logs() / "engine-0.log").open("a") as file:
        file.write("r")
    state(run_dir, status="finished")
    assert list(lines) == ["engine-0 | four"]


def test_stop_asks_and_waits_for_the_end(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    def controller() -> None:
        while not run_dir.stop.exists():
            os.sched_yield()
        state(run_dir, status="stopped")

    state(run_dir, status="running")
    thread = threading.Thread(target=controller)
    thread.start()
    assert main(["stop", "demo"]) == 0
    thread.join()
    assert capsys.readouterr().out.splitlines()[-1] == "stopped"


def test_stop_may_leave_at_once(run_dir: RunDir) -> None:
    state(run_dir, status="running")
    assert main(["stop", "--no-wait"]) == 0
    assert run_dir.stop.exists()


def test_a_run_that_is_over_is_not_stopped_again(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    state(run_dir, status="finished")
    assert main(["stop"]) == 0
    assert not run_dir.stop.exists()
    assert "is over already: finished" in capsys.readouterr().out
