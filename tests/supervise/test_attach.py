"""Beside a living process: a shell in its environment on a real terminal, and the stacks of its threads."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prl.cli import main
from prl.run_dir import RunDir

from tests.terminal import on_terminal

WORKER = """
import sys, threading
from prl.run_dir import RunDir
from prl.supervise.beats import Beat
from prl.worker import tell_stacks_on_request

def waits_for_input():
    sys.stdin.read()

def waits_for_the_other():
    other.join()

run_dir, name = RunDir(sys.argv[2]), sys.argv[7]
Beat(run_dir, name)()
tell_stacks_on_request(run_dir, name)
other = threading.Thread(target=waits_for_input)
other.start()
print(flush=True)
waits_for_the_other()
"""
Start = Callable[[str], subprocess.Popen[bytes]]


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.chdir(tmp_path)
    run = RunDir("runs/demo")
    run.path.mkdir(parents=True)
    run.config.write_text("")
    return run


@pytest.fixture
def start(run_dir: RunDir) -> Iterator[Start]:
    """A living process of that name, in a folder and an environment of its own."""
    living: list[subprocess.Popen[bytes]] = []

    def begin(name: str) -> subprocess.Popen[bytes]:
        role, _, index = name.rpartition("-")
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, "--run", str(run_dir.path), "--role", role, "--index", index, name],
            cwd="/",
            env={**os.environ, "TALE": "told once", "RANK": index, "SHELL": "/bin/false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout
        process.stdout.readline()
        living.append(process)
        return process

    yield begin
    for process in living:
        process.kill()
        process.communicate()


def listed(run_dir: RunDir, *names: str, host: str = "") -> None:
    entries: list[dict[str, Any]] = []
    for name in names:
        role, _, index = name.rpartition("-")
        entries.append({"role": role, "index": int(index), "pid": 1, "host": host or socket.gethostname()})
    run_dir.write_json(run_dir.processes, entries)


def test_a_shell_has_the_environment_and_the_folder_of_the_process(run_dir: RunDir, start: Start) -> None:
    process = start("engine-1")
    listed(run_dir, "controller-0", "engine-1")
    code, shown = on_terminal(
        [sys.executable, "-m", "prl", "attach", "engine-1"],
        typed='echo "<$TALE|$PWD|$PRL_PROCESS|$PRL_PID|$PRL_RUN|$TERM>"; test -t 0 && exit 7\n',
        env={**os.environ, "SHELL": "/bin/sh", "TERM": "vt100", "TALE": "not this one"},
    )
    assert code == 7
    assert f"<told once|/|engine-1|{process.pid}|{run_dir.path}|vt100>" in shown


def test_a_command_runs_where_a_process_was_that_is_gone(run_dir: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    listed(run_dir, "controller-0")
    assert main(["attach", "-c", 'echo "<$PRL_PROCESS|$PRL_PID>"; exit 5']) == 5
    out, err = capfd.readouterr()
    assert out == "<controller-0|>\n"
    assert err == "controller-0 does not live here: this is a shell where it ran\n"


def test_every_thread_says_where_it_stands(run_dir: RunDir, start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    agent, rank = start("trainer-0"), start("trainer-rank-0")
    (run_dir.beats / "trainer-rank-1").write_bytes((run_dir.beats / "trainer-0").read_bytes())  # of another host
    listed(run_dir, "trainer-0")
    for _ in range(2):  # asked again, it says it again, and only that
        assert main(["attach", "trainer-0", "--stacks"]) == 0
        out = capfd.readouterr().out
        heads = [line for line in out.splitlines() if line.startswith("---")]
        assert heads == [f"--- trainer-0 (pid {agent.pid})", f"--- trainer-rank-0 (pid {rank.pid})"]
        assert out.count(" in waits_for_input\n") == out.count(" in waits_for_the_other\n") == 2


def test_what_cannot_be_attached_to(run_dir: RunDir, start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["attach", "engine-1"]) == 2
    assert "has no process 'engine-1'; it has none that was started" in capfd.readouterr().err
    listed(run_dir, "controller-0", "engine-0", host="elsewhere")
    assert main(["attach", "demo", "engine-1"]) == 2
    assert "has no process 'engine-1'; it has controller-0, engine-0" in capfd.readouterr().err
    assert main(["attach", "engine-0"]) == 2
    assert "runs on elsewhere: ask there" in capfd.readouterr().err
    listed(run_dir, "engine-0")
    assert main(["attach", "engine-0", "--stacks"]) == 75
    assert "engine-0 does not live here" in capfd.readouterr().err


def test_a_stopped_process_is_said_to_be_silent(run_dir: RunDir, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    from prl.supervise import attach

    monkeypatch.setattr(attach, "_ANSWER_SECONDS", 0.5)
    start("engine-0").send_signal(signal.SIGSTOP)
    assert "no answer within 0 s: the process is stopped" in attach.stacks(run_dir, "engine-0")
