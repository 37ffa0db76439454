"""Runs of the main job on the cluster of these tests, at their smallest."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import attrs
from prl.checkpoint_dir import complete
from prl.cli.runs import FINAL
from prl.ledger.audit import audit
from prl.run_dir import RunDir

from tests.end_to_end.live import ROOT, Run
from tests.slurm.cluster import Cluster, until

PATIENCE = 600.0
"""Seconds before a test gives up on a run: six processes import torch, maybe on two busy cores."""
CONFIG = f"""
extends = "{ROOT}/configs/functions.toml"
plugins = ["slurm", "disk"]
[model]
type = "qwen3"
hidden_size = 32
intermediate_size = 64
layers = 1
heads = 2
kv_heads = 1
head_dim = 16
[[environments]]
type = "functions"
name = "vowels"
file = "{ROOT}/configs/functions/letters.jsonl"
reward = "{ROOT}/tests/slurm/vowels.py:share"
[optimizer]
learning_rate = 3e-3
[warmup]
steps = 0
[rollouts]
groups_per_step = 8
[evaluation]
every = 0
[checkpoints]
huggingface = false
[engine]
count = 2
[weights]
type = "disk"
[launcher]
type = "slurm"
exclusive = false
memory = "1000"
"""
"""A policy of one small layer that learns to say vowels, from nothing, in some 30 steps of hundredths of a second."""
TWO_TRAINER_NODES = ("trainer.ranks=2", "trainer.nodes=2")


@attrs.frozen(kw_only=True)
class Job(Run):
    """A run that was submitted."""

    cluster: Cluster
    said: str
    """What `prl launch` said."""

    @property
    def id(self) -> str:
        job: str = json.loads(self.dir.launch.read_text())["job"]
        return job

    @property
    def entries(self) -> list[dict[str, Any]]:
        """processes.json, or nothing yet."""
        return json.loads(self.dir.processes.read_text()) if self.dir.processes.exists() else []

    def host(self, name: str) -> str:
        """The node a process runs on."""
        return next(str(e["host"]) for e in self.entries if f"{e['role']}-{e['index']}" == name)

    def trains(self) -> bool:
        """The attempt that lives has begun, and made a step."""
        return self.state.get("status") == "running" and self.state["step"] > self.steps_before_attempt()

    def steps_before_attempt(self) -> int:
        """The cut it began from."""
        resumed = json.loads(self.dir.resume.read_text()) if self.dir.resume.exists() else {}
        return int(resumed.get("checkpoint", "").rpartition("-")[2] or 0)

    def kept(self) -> list[Path]:
        """Its complete checkpoints."""
        return complete(self.dir.checkpoints)

    def failures(self) -> list[dict[str, Any]]:
        """failures.jsonl; one empty line of its form before there is one."""
        path = self.dir.failures
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else [{"done": ""}]

    @property
    def turns(self) -> list[dict[str, Any]]:
        path = self.dir.path / "slurm" / "turns.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait; the run must not end first."""

        def holds() -> object:
            assert self.state.get("status") not in FINAL or condition(), f"{what}: {self.tell()}"
            return condition()

        until(holds, f"{what}: {self.tell()}", PATIENCE)

    def ended(self) -> str:
        """Wait until the job has left the queue; the run's last word."""
        until(lambda: not self.cluster.jobs(self.dir.path.name), f"the job did not end: {self.tell()}", PATIENCE)
        status: str = self.state["status"]
        return status

    def tell(self) -> str:
        """What is known, for a test that failed."""
        log = self.dir.path / "slurm" / "job.log"
        return f"{self.state}\n{log.read_text() if log.exists() else ''}"

    def prl(self, *words: str) -> str:
        """A command about this run, from the login node."""
        done = prl(self.cluster, *words[:1], str(self.dir.path), *words[1:])
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def audited(self) -> None:
        """`prl audit` finds nothing."""
        failed = [check for check in audit(self.dir).checks if check.problems]
        assert not failed, failed

    def told(self) -> list[tuple[str, str]]:
        """(where, what was done) of every failure that the ledger has."""
        with closing(sqlite3.connect(self.dir.ledger)) as ledger:
            return ledger.execute("SELECT place, done FROM failures").fetchall()

    def begun_from(self) -> str:
        """The hash of the version that its last launch started from."""
        with closing(sqlite3.connect(self.dir.ledger)) as ledger:
            (chain,) = ledger.execute("SELECT chain FROM launches ORDER BY launch DESC").fetchone()
            return str(chain)

    def chain(self) -> dict[int, str]:
        """Version -> the hash of its weights, its batch and all that came before, of those that count."""
        with closing(sqlite3.connect(self.dir.ledger)) as ledger:
            return dict(ledger.execute("SELECT version, chain FROM versions WHERE void_by IS NULL").fetchall())


def prl(cluster: Cluster, *words: str) -> subprocess.CompletedProcess[str]:
    """`prl WORDS` on the login node."""
    return subprocess.run(
        [sys.executable, "-m", "prl", *words],
        env=cluster.env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def launch(cluster: Cluster, folder: Path, *edits: str, words: Sequence[str] = ()) -> Job:
    """`prl launch`, into `folder`."""
    done = command(cluster, folder, *edits, words=words)
    assert done.returncode == 0, done.stdout + done.stderr
    return Job(dir=RunDir(folder), cluster=cluster, said=done.stdout)


def command(cluster: Cluster, folder: Path, *edits: str, words: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    config = folder.parent / f"{folder.name}.toml"
    config.write_text(CONFIG)
    sets = [word for edit in (f"run.dir={folder}", "trackers=[]", *edits) for word in ("--set", edit)]
    return prl(cluster, "launch", str(config), *sets, *words)
