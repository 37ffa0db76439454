"""`prl worker`: what happens before, around and after a role."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from prl.compose.compose import compose, create_run
from prl.run_dir import RunDir
from prl.worker import ROLES

SCRIPT = """
import sys
import prl.worker
from prl.run_dir import RunDir
prl.worker.ROLES["engine"] = "role"
sys.exit(prl.worker.main(RunDir(sys.argv[1]), "engine", 1))
"""


@pytest.fixture
def run_dir(toy_config: Path, tmp_path: Path) -> RunDir:
    return create_run(compose(toy_config, overrides=[f"run.dir={tmp_path / 'run'}"]), toy_config)


def worker(run_dir: RunDir, tmp_path: Path, role: str) -> subprocess.Popen[str]:
    """A worker whose engine role is this module."""
    (tmp_path / "role.py").write_text(textwrap.dedent(role))
    path = os.pathsep.join(map(str, [tmp_path, tmp_path / "site-prl_toy"]))
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(run_dir.path)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("body", "code", "error"),
    [
        ("print(composition.run.run.steps, run_dir.path.name, index)", 0, ""),
        ("return 5", 5, ""),
        ("from prl.errors import InfrastructureError; raise InfrastructureError('no answer')", 75, "no answer\n"),
        ("from prl.errors import UserError; raise UserError('wrong')", 2, "wrong\n"),
    ],
)
def test_a_role_is_run_and_its_end_is_the_exit_code(
    run_dir: RunDir, tmp_path: Path, body: str, code: int, error: str
) -> None:
    process = worker(run_dir, tmp_path, f"def main(composition, run_dir, index): {body}")
    out, err = process.communicate()
    assert (process.returncode, err) == (code, error)
    assert out == ("3 run 1\n" if not code else "")


def test_what_was_not_foreseen_keeps_its_traceback(run_dir: RunDir, tmp_path: Path) -> None:
    process = worker(run_dir, tmp_path, "def main(composition, run_dir, index): return {}['x']")
    _, err = process.communicate()
    assert process.returncode == 70
    assert err.splitlines()[0] == "Traceback (most recent call last):"
    assert err.splitlines()[-1] == "KeyError: 'x'"


def test_sigterm_cancels_what_runs(run_dir: RunDir, tmp_path: Path) -> None:
    role = """
        import asyncio

        async def serve():
            print("up", flush=True)
            try:
                await asyncio.Event().wait()
            finally:
                print("cleaned up", flush=True)

        def main(composition, run_dir, index):
            asyncio.run(serve())
    """
    process = worker(run_dir, tmp_path, role)
    assert process.stdout
    assert process.stdout.readline() == "up\n"
    process.terminate()
    out, err = process.communicate()
    assert (out, err, process.returncode) == ("cleaned up\n", "", 143)


def test_a_worker_does_not_outlive_its_parent() -> None:
    child = (
        "import os, signal, prl.worker as w; w._live_with_parent(os.getppid(), lambda: None);"
        " print('up', flush=True); signal.pause()"
    )
    parent = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "print(child.stdout.readline().decode(), flush=True)"
    )
    # The child inherits stderr, so that pipe ends when both are gone.
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.stderr) == ("up", "")


def test_every_role_of_the_plan_has_a_module() -> None:
    assert {"controller", "engine", "engine-part", "environment", "replay", "trainer", "trainer-rank"} == set(ROLES)
