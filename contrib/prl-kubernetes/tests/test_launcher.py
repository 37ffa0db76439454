"""What is asked of kubectl, and what its answers mean. kubectl is a script that writes down what it is asked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from prl.compose.plan import LaunchPlan, Process
from prl.errors import ConfigError, InfrastructureError, UserError
from prl.run_dir import RunDir, read_json
from prl_kubernetes import KubernetesConfig
from prl_kubernetes.launcher import KubernetesLauncher, KubernetesRun

SCRIPT = """#!/bin/sh
echo "$@" >> {folder}/asked
if [ -f {folder}/refuse ]; then echo "no route to the cluster" >&2; exit 1; fi
case "$*" in
  *"get pods"*) cat {folder}/pods ;;
  *get*) cat {folder}/objects ;;
  *"-f -"*) cat > {folder}/applied ;;
  *apply*) echo "jobset.jobset.x-k8s.io/tale-1 created" ;;
esac
"""
Say = Callable[..., None]


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its folder: what it was asked, and its answers."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "kubectl").write_text(SCRIPT.format(folder=folder))
    (folder / "kubectl").chmod(0o755)
    for name in ("pods", "objects"):
        (folder / name).write_text('{"items": []}')
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder


@pytest.fixture
def plan(tmp_path: Path) -> LaunchPlan:
    run_dir = RunDir(tmp_path / "tale")
    run_dir.logs(1).mkdir(parents=True)
    roles = [("controller", 0), ("engine", 0), ("engine", 1), ("trainer", 0)]
    processes = [Process(role=role, index=i, argv=("python",), env={}, cpus=1, gpus=0) for role, i in roles]
    return LaunchPlan(run_dir=run_dir, processes=tuple(processes))


@pytest.fixture
def launcher(tmp_path: Path) -> KubernetesLauncher:
    config = KubernetesConfig(image="prl:1", claim="runs", mount=str(tmp_path), namespace="rl")
    return KubernetesLauncher(config)


def asked(kubectl: Path) -> list[str]:
    return (kubectl / "asked").read_text().splitlines()


def answer(kubectl: Path, file: str, *items: dict[str, Any]) -> None:
    (kubectl / file).write_text(json.dumps({"items": list(items)}))


def jobset(**status: Any) -> dict[str, Any]:
    return {"kind": "JobSet", "metadata": {"name": "tale-1"}, "status": status}


def pod(name: str, part: str, phase: str = "Running") -> dict[str, Any]:
    labels = {"prl/run": "tale-1", "jobset.sigs.k8s.io/replicatedjob-name": part}
    return {"metadata": {"name": name, "labels": labels}, "status": {"phase": phase}}


def test_a_manifest_is_checked_by_the_cluster_and_applied(
    kubectl: Path, plan: LaunchPlan, launcher: KubernetesLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.check(plan)
    assert asked(kubectl) == ["--namespace=rl apply --dry-run=server -f -"]
    assert (kubectl / "applied").read_text() == launcher.render(plan)
    assert launcher.launch(plan) == 0
    manifest = plan.run_dir.path / "kubernetes" / "manifest.yaml"
    assert asked(kubectl)[1:] == [f"--namespace=rl apply -f {manifest}"]
    assert list(yaml.safe_load_all(manifest.read_text())) == list(yaml.safe_load_all(launcher.render(plan)))
    assert "created" in capsys.readouterr().out
    assert read_json(plan.run_dir.launch)["name"] == "tale-1"


def test_a_run_outside_the_volume_and_a_cluster_that_refuses(
    kubectl: Path, plan: LaunchPlan, launcher: KubernetesLauncher, tmp_path: Path
) -> None:
    elsewhere = KubernetesLauncher(KubernetesConfig(image="prl:1", claim="runs", mount="/shared"))
    with pytest.raises(UserError, match=r"does not lie below launcher.mount \(/shared\)"):
        elsewhere.check(plan)
    (kubectl / "refuse").touch()
    with pytest.raises(InfrastructureError, match="kubectl apply: no route to the cluster"):
        launcher.check(plan)


@pytest.fixture
def run(kubectl: Path, plan: LaunchPlan, launcher: KubernetesLauncher) -> KubernetesRun:
    launcher.launch(plan)
    (kubectl / "asked").unlink()
    return launcher.remote(plan.run_dir)


@pytest.mark.parametrize(
    ("status", "row", "over"),
    [
        ({}, "tale-1 waits", False),
        (
            {"restarts": 2, "replicatedJobsStatus": [{"name": "engine", "ready": 1}]},
            "tale-1 engine 1 ready, 2 restarts",
            False,
        ),
        ({"terminalState": "Failed", "restarts": 3}, "tale-1 Failed", True),
    ],
)
def test_what_the_cluster_says_of_a_jobset(
    kubectl: Path, run: KubernetesRun, status: dict[str, Any], row: str, over: bool
) -> None:
    answer(kubectl, "objects", jobset(**status))
    assert run.rows() == [["jobset", row]]
    assert run.over() is over
    assert asked(kubectl) == ["--namespace=rl get jobsets.jobset.x-k8s.io -l prl/run=tale-1 -o json"]  # asked once


def test_what_is_gone_is_over_and_what_does_not_answer_says_so(kubectl: Path, run: KubernetesRun) -> None:
    assert run.over()
    assert run.rows() == [["cluster", "has no tale-1 any more"]]
    (kubectl / "refuse").touch()
    run._asked = float("-inf")
    assert run.rows() == [["cluster", "kubectl get: no route to the cluster"]]


@pytest.mark.parametrize(("phase", "removed"), [("Running", False), ("Pending", True)])
def test_what_waits_is_removed_and_what_runs_is_left_to_end(
    kubectl: Path, run: KubernetesRun, phase: str, removed: bool
) -> None:
    answer(kubectl, "objects", jobset())
    answer(kubectl, "pods", pod("tale-1-controller-0-0-x", "controller", phase))
    run.stop()
    assert ("--namespace=rl delete jobset tale-1 --wait=false" in asked(kubectl)) is removed


def test_a_terminal_is_opened_in_the_pod_of_the_process(kubectl: Path, run: KubernetesRun) -> None:
    answer(kubectl, "pods", pod("old", "engine", "Failed"), pod("tale-1-engine-0-1-x", "engine"), pod("t", "trainer"))
    assert run.attach("engine-1", "", ["-m", "prl.supervise.attach"]) == 0
    assert asked(kubectl) == [
        "--namespace=rl get pods -l prl/run=tale-1,batch.kubernetes.io/job-completion-index=1 -o json",
        "--namespace=rl exec -i tale-1-engine-0-1-x -- python -m prl.supervise.attach",
    ]
    with pytest.raises(UserError, match="no pod of engine-7 runs; the run has controller-0, engine-0"):
        run.attach("engine-7", "", [])


def test_what_no_cluster_could_run_is_refused(tmp_path: Path) -> None:
    from prl.compose.compose import compose

    spell = Path(__file__).parents[3] / "configs" / "spell_backward.toml"
    given = ["launcher.type=kubernetes", "launcher.image=x", "launcher.claim=c", "launcher.mount=runs"]
    edits = [*given, "weights.type=disk", "run.network=loopback", "launcher.node_selector=['gpu']"]
    with pytest.raises(ConfigError) as refused:
        compose(spell, plugins="kubernetes,disk", overrides=edits)
    said = str(refused.value)
    assert "launcher.mount must be an absolute path, got 'runs'" in said
    assert "run.network = 'loopback' cannot be reached from another pod" in said
    assert "launcher.node_selector: 'gpu' is not KEY=VALUE" in said


def test_its_module_is_light() -> None:
    """It is imported wherever a run is composed."""
    script = "import sys, prl_kubernetes; print(*{'torch', 'yaml'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "\n"
