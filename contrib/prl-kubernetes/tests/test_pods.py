"""A run from its manifest: every pod's command is a process here, and this test is the JobSet's controller.

There is no cluster: what Kubernetes itself does with the manifest is not shown.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prl.ledger.audit import audit
from prl.run_dir import RunDir, read_json

ROOT = Path(__file__).parents[3]
PATIENCE = 300.0
CONFIG = f"""
extends = "{ROOT}/configs/functions.toml"
plugins = ["kubernetes", "disk"]
[run]
steps = 100000
network = "127.0.0.0/8"
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
name = "letters"
file = "{ROOT}/configs/functions/letters.jsonl"
reward = "{ROOT}/configs/functions/rewards.py:closeness"
[warmup]
steps = 0
[evaluation]
every = 0
[checkpoints]
every = 4
huggingface = false
[weights]
type = "disk"
[launcher]
type = "kubernetes"
image = "registry/prl:1"
claim = "runs"
"""


class Cluster:
    """The pods of one manifest."""

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        (jobset,) = yaml.safe_load_all((run_dir.path / "kubernetes" / "manifest.yaml").read_text())
        self._jobs = {job["name"]: job["template"]["spec"] for job in jobset["spec"]["replicatedJobs"]}
        self.pods: dict[tuple[str, int], subprocess.Popen[bytes]] = {}

    def start(self, restart: int) -> None:
        for name, job in self._jobs.items():
            for index in range(job["completions"]):
                self.start_pod(name, index, restart)

    def start_pod(self, name: str, index: int, restart: int) -> None:
        container = self._jobs[name]["template"]["spec"]["containers"][0]
        given = {"JOB_COMPLETION_INDEX": str(index), "PRL_RESTART": str(restart), "OMP_NUM_THREADS": "1"}
        with (self.run_dir.path / f"{name}-{index}.out").open("ab") as out:
            self.pods[name, index] = subprocess.Popen(
                container["command"],
                env={**os.environ, **given},
                cwd=container["workingDir"],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    def kill(self, *pods: tuple[str, int]) -> None:
        for pod in pods or list(self.pods):
            self.pods[pod].kill()
            self.pods[pod].wait()

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.tell()
            time.sleep(0.05)

    @property
    def state(self) -> dict[str, Any]:
        return read_json(self.run_dir.state) or {}

    def trains(self, step: int) -> bool:
        return self.state.get("status") == "running" and self.state["step"] >= step

    def tell(self) -> str:
        outs = {path.name: path.read_text()[-2000:] for path in self.run_dir.path.glob("*.out")}
        return f"{self.state} {outs}"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Launched where there is no kubectl: the manifest is all there is."""
    config = tmp_path / "config.toml"
    config.write_text(CONFIG)
    here = (f"launcher.mount={tmp_path}", f"launcher.python={sys.executable}", f"run.dir={tmp_path}/runs/tale")
    sets = [word for edit in here for word in ("--set", edit)]
    done = subprocess.run(
        [sys.executable, "-m", "prl", "launch", str(config), *sets],
        env=os.environ | {"PATH": "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run_dir = RunDir(tmp_path / "runs/tale")
    assert done.stdout.splitlines()[-1].endswith(f"kubectl apply -f {run_dir.path}/kubernetes/manifest.yaml")
    cluster = Cluster(run_dir)
    yield cluster
    cluster.kill()


def test_a_run_outlives_an_engine_and_begins_again_without_its_trainer(cluster: Cluster) -> None:
    run_dir = cluster.run_dir
    cluster.start(restart=0)
    cluster.until(lambda: cluster.trains(2))

    cluster.kill(("engine", 0))
    cluster.start_pod("engine", 0, restart=0)
    before = cluster.state["step"]
    cluster.until(lambda: cluster.trains(before + 6))
    (line,) = [json.loads(line) for line in run_dir.failures.read_text().splitlines()]
    assert (line["role"], line["index"], line["done"]) == ("engine", 0, "another pod took its place")

    cluster.kill(("trainer", 0))
    cluster.kill()  # all that is left, before anything begins again
    cluster.start(restart=1)
    cluster.until(lambda: run_dir.attempts() == [1, 2] and cluster.trains(2))
    cut = int(read_json(run_dir.resume)["checkpoint"].rpartition("-")[2])
    assert cut % 4 == 0
    cluster.until(lambda: cluster.trains(cut + 2))

    run_dir.stop.touch()
    assert [pod.wait(PATIENCE) for pod in cluster.pods.values()] == [0] * len(cluster.pods), cluster.tell()
    assert cluster.state["status"] == "stopped"
    assert [check for check in audit(run_dir).checks if check.problems] == []
