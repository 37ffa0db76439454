"""A run as its user has it: `prl launch` in a process of its own, and the files it writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
from prl.run_dir import RunDir, read_json

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0
TINY = f"""
extends = "{ROOT}/configs/spell_backward.toml"
[model]
type = "qwen3"
hidden_size = 32
intermediate_size = 64
layers = 1
heads = 2
kv_heads = 1
head_dim = 16
[warmup]
steps = 2
samples_per_step = 8
[rollouts]
groups_per_step = 4
group_size = 2
max_tokens = 6
[evaluation]
every = 2
tasks = 4
"""
"""The main job at its smallest: a step takes a few hundredths of a second."""


def prl(*words: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`prl WORDS`, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "prl", *words],
        env=_environment(env),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def _environment(env: Mapping[str, str] | None) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}


@attrs.frozen(kw_only=True)
class Run:
    """What a run left, or leaves as it goes."""

    dir: RunDir

    @property
    def state(self) -> dict[str, Any]:
        return read_json(self.dir.state) or {}

    @property
    def lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl."""
        return _lines(self.dir.metrics)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of optimizer steps."""
        return [line for line in self.lines if line["phase"] != "eval"]

    @property
    def rl_steps(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["phase"] == "rl"]

    @property
    def rollouts(self) -> list[dict[str, Any]]:
        return _lines(self.dir.rollouts)

    @property
    def checkpoint(self) -> Path:
        """The newest one."""
        return self.dir.checkpoints / f"step-{self.state['step']}"

    def pid(self, role: str) -> int:
        """The process of that role that was started first."""
        return min(pid for pid, words in self.processes().items() if words[words.index("--role") + 1] == role)

    def processes(self) -> dict[int, list[str]]:
        """Every living process of the run, its trainer ranks included: pid -> command line."""
        found = dict(_command_lines())
        return {pid: words for pid, words in found.items() if "worker" in words and str(self.dir.path) in words}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: the file may be growing."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _command_lines() -> Iterator[tuple[int, list[str]]]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield int(path.parent.name), path.read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue


@attrs.define(kw_only=True)
class Launched(Run):
    """A run that goes on in the background."""

    popen: subprocess.Popen[str]

    def until(self, condition: Callable[[], Any], patience: float = PATIENCE) -> None:
        """Wait until `condition` holds, for at most `patience` seconds; the run must live that long."""
        deadline = time.monotonic() + patience
        while not condition():
            assert self.popen.poll() is None, f"the run ended: {self.popen.communicate()}"
            assert time.monotonic() < deadline, f"waited in vain; the run's state is {self.state}"
            time.sleep(0.05)

    def end(self, patience: float = PATIENCE) -> tuple[int, str]:
        """Exit code and standard error of `prl launch`, which may take `patience` seconds."""
        _, errors = self.popen.communicate(timeout=patience)
        return self.popen.returncode, errors


@contextmanager
def launched(
    config: Path, directory: Path, *edits: str, words: tuple[str, ...] = (), env: Mapping[str, str] | None = None
) -> Iterator[Launched]:
    """`prl launch CONFIG --set EDIT...` into a directory; ended when the block is left."""
    sets = [word for edit in (f"run.dir={directory}", *edits) for word in ("--set", edit)]
    popen = subprocess.Popen(
        [sys.executable, "-m", "prl", "launch", str(config), *words, *sets],
        env=_environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run = Launched(dir=RunDir(directory), popen=popen)
    try:
        yield run
    finally:
        if popen.poll() is None:
            popen.send_signal(signal.SIGTERM)
            popen.send_signal(signal.SIGTERM)
            popen.communicate(timeout=PATIENCE)


def kill(run: Launched) -> None:
    """Everything at once, the launcher first, as a machine that loses power."""
    run.popen.kill()
    for pid in run.processes():
        os.kill(pid, signal.SIGKILL)
    run.popen.communicate()


def sets(edits: Iterable[str]) -> list[str]:
    return [word for edit in edits for word in ("--set", edit)]


def succeed(*words: str) -> None:
    done = prl(*words)
    assert done.returncode == 0, done.stdout + done.stderr


def installed(folder: Path, name: str, program: str) -> Path:
    """A folder for PYTHONPATH that has the plugin `name` in it, as a distribution of its own."""
    site = folder / "site"
    package, metadata = site / f"prl_{name}", site / f"prl_{name}-0.0.1.dist-info"
    for path in (package, metadata):
        path.mkdir(parents=True)
    (package / "__init__.py").write_text(textwrap.dedent(program))
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: prl-{name}\nVersion: 0.0.1\n")
    (metadata / "entry_points.txt").write_text(f"[prl]\n{name} = prl_{name}\n")
    return site
