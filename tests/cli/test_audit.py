"""`prl audit`, `prl explain`, and what `prl status` takes from the ledger."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from prl.cli import main
from prl.run_dir import RunDir

from tests.ledger.histories import eventful, write


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """`runs/demo` below the working directory, with an eventful history."""
    monkeypatch.chdir(tmp_path)
    run = RunDir("runs/demo")
    run.path.mkdir(parents=True)
    run.config.write_text("")
    write(run.ledger, eventful().facts)
    lines = [{"step": 6, "phase": "rl", "loss/rl": 0.25}, {"step": 6, "phase": "eval", "loss/rl": 9.0}]
    run.metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return run


def bend(run_dir: RunDir) -> None:
    with sqlite3.connect(run_dir.ledger) as ledger:
        ledger.execute("DELETE FROM versions WHERE version = 4")
    ledger.close()


def test_an_audit_prints_every_check_and_returns_0(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "demo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "PASS: 11 checks"
    assert sum(line.startswith("PASS  ") for line in lines) == 11
    assert any(line.split() == ["trained", "all", "10", "29", "3.966", "0.3448", "1"] for line in lines)
    assert "not proven" in lines


def test_an_audit_that_fails_says_why_and_returns_1(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    bend(run_dir)
    assert main(["audit"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "FAIL: 2 of 11 checks"
    assert "      ! versions 4 are missing" in lines


def test_an_audit_is_there_for_programs(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    bend(run_dir)
    assert main(["audit", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False
    assert [check["name"] for check in found["checks"] if not check["passed"]] == ["versions", "chain"]
    assert found["bias"][0]["end"] == "trained"


def test_a_run_without_a_ledger_is_a_sentence(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir.ledger.unlink()
    assert main(["audit"]) == 1
    assert capsys.readouterr().err.startswith(f"there is no ledger at {run_dir.ledger}")


def test_a_step_is_explained(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "demo", "--step", "6"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert out.startswith("step 6 (rl): trained\n")
    assert ["loss/rl", "0.25"] in rows
    assert ["6", "toy", "3", "1", "0", "1", "4", "1", "0.5", "5:4", "0"] in rows
    assert "group 6 attempt 0 toy 3 environment issued again in flight for 2.0 s" in map(" ".join, rows)
    assert main(["explain", "--step", "6", "--json"]) == 0
    step = json.loads(capsys.readouterr().out)
    assert [group["attempt"] for group in step["groups"]] == [1, 0]


def test_the_newest_step_is_explained_by_default(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == 0
    assert capsys.readouterr().out.startswith("step 8 (rl): handed to the trainer, not done\n")


def test_a_warm_up_step_is_explained(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--step", "1"]) == 0
    out = capsys.readouterr().out
    assert "not published" in out
    assert out.count("  toy ") + out.count("   toy ") >= 3


def test_a_step_that_is_not_on_record_is_the_users_mistake(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--step", "44"]) == 2
    assert capsys.readouterr().err == "step 44 is not on record; the ledger has steps 1-8\n"


def test_status_shows_the_last_failure(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 0
    rows = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert ["last", "failure", "6.2: no such file (group 6 goes on without it)"] in rows


def test_status_and_audit_import_nothing_heavy(run_dir: RunDir) -> None:
    program = (
        "import sys; from prl.cli import main; main(['status']); main(['audit'])\n"
        "print([name for name in ('torch', 'zmq', 'aiohttp', 'msgpack') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
