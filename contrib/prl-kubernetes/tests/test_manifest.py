"""The objects of a run: what they hold, and that the published schemas allow them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from prl.compose.plan import LaunchPlan, Process
from prl.run_dir import RunDir
from prl_kubernetes import KubernetesConfig
from prl_kubernetes.manifest import groups, name_of, objects, toleration

Problems = Callable[[Any], list[str]]

CONFIG = KubernetesConfig(image="registry/prl:1", claim="runs", mount="/shared")
FULL = attrs.evolve(
    CONFIG,
    namespace="rl",
    memory="64Gi",
    node_selector=("gpu=h200",),
    tolerations=("gpu:NoSchedule",),
    service_account="trainer",
    image_pull_secrets=("registry",),
    priority_class="high",
)


def process(role: str, index: int, *, gpus: int = 0, cpus: int = 1, kind: str = "") -> Process:
    return Process(role=role, index=index, argv=("python",), env={}, cpus=cpus, gpus=gpus, kind=kind)


PLAN = LaunchPlan(
    run_dir=RunDir(Path("/shared/runs/GLM_5 tale")),
    processes=(
        process("controller", 0),
        *(process("engine", index, gpus=8, kind="prefill" if index < 2 else "decode") for index in range(5)),
        process("environment", 0),
        process("trainer", 0, gpus=8, cpus=8),
        process("trainer", 1, gpus=8, cpus=8),
    ),
)


def test_processes_that_are_alike_are_the_indexes_of_one_job() -> None:
    assert [(pods.name, pods.position, len(pods.processes)) for pods in groups(PLAN.processes)] == [
        ("controller", 0, 1),
        ("engine-prefill", 1, 2),
        ("engine-decode", 3, 3),
        ("environment", 6, 1),
        ("trainer", 7, 2),
    ]


@pytest.mark.parametrize("config", [CONFIG, FULL, attrs.evolve(CONFIG, restarts=0)])
def test_a_jobset_is_what_its_schema_allows(config: KubernetesConfig, jobset_problems: Problems) -> None:
    (jobset,) = objects(PLAN, config, 1)
    assert jobset_problems(jobset) == []
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")


@pytest.mark.parametrize("config", [CONFIG, FULL])
def test_plain_jobs_are_what_their_schema_allows(config: KubernetesConfig, job_problems: Problems) -> None:
    jobs = objects(PLAN, attrs.evolve(config, kind="jobs"), 1)
    assert {(job["apiVersion"], job["kind"]) for job in jobs} == {("batch/v1", "Job")}
    assert [job["metadata"]["name"] for job in jobs][:2] == ["glm-5-tale-1-controller", "glm-5-tale-1-engine-prefill"]
    for job in jobs:
        assert job_problems({key: job[key] for key in ("metadata", "spec")}) == []


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("spec", "successPolicy", "operator"), "Some", "spec.successPolicy.operator: 'Some' is none of"),
        (("spec", "failurePolicy", "maxRestarts"), "10", "spec.failurePolicy.maxRestarts: '10' is no integer"),
        (("spec", "replicas"), 1, "spec.replicas: the schema knows no such field"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "cmd"), ["x"], "cmd"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "volumes", 0, "name"), None, "is no"),
    ],
)
def test_the_schema_refuses_what_is_wrong(
    path: tuple[Any, ...], value: Any, sentence: str, jobset_problems: Problems
) -> None:
    jobset = copy.deepcopy(objects(PLAN, FULL, 1)[0])
    place: Any = jobset
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (found,) = jobset_problems(jobset)
    assert sentence in found


def test_the_run_ends_with_its_controller_and_begins_again_without_its_trainer() -> None:
    (jobset,) = objects(PLAN, attrs.evolve(CONFIG, restarts=3), 2)
    assert jobset["metadata"] == {"name": "glm-5-tale-2", "labels": {"prl/run": "glm-5-tale-2"}}
    assert jobset["spec"]["successPolicy"] == {"operator": "All", "targetReplicatedJobs": ["controller"]}
    jobs = {job["name"]: job["template"]["spec"] for job in jobset["spec"]["replicatedJobs"]}
    assert {name: job["backoffLimit"] for name, job in jobs.items()} == {
        "controller": 0,
        "engine-prefill": 6,
        "engine-decode": 9,
        "environment": 3,
        "trainer": 0,
    }
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 3
    assert jobset["spec"]["failurePolicy"]["restartStrategy"] == "BlockingRecreate"


def test_a_pod_has_what_the_plan_asks_for() -> None:
    (jobset,) = objects(PLAN, FULL, 1)
    trainer = jobset["spec"]["replicatedJobs"][-1]["template"]["spec"]
    assert (trainer["completions"], trainer["parallelism"], trainer["completionMode"]) == (2, 2, "Indexed")
    pod = trainer["template"]["spec"]
    container = pod["containers"][0]
    assert container["command"] == [
        "python",
        "-m",
        "prl_kubernetes.pod",
        "/shared/runs/GLM_5 tale",
        "glm-5-tale-1",
        "7",
    ]
    assert container["resources"] == {"requests": {"cpu": 8}, "limits": {"nvidia.com/gpu": 8, "memory": "64Gi"}}
    assert container["volumeMounts"][0] == {"name": "run", "mountPath": "/shared"}
    assert pod["volumes"][0] == {"name": "run", "persistentVolumeClaim": {"claimName": "runs"}}
    assert (pod["nodeSelector"], pod["restartPolicy"]) == ({"gpu": "h200"}, "Never")


@pytest.mark.parametrize(
    ("folder", "name"),
    [("tale", "tale-1"), ("0-seed=1", "run-0-seed-1-1"), ("x" * 80, f"{'x' * 40}-1"), ("_", "run-1")],
)
def test_names_are_labels(folder: str, name: str) -> None:
    assert name_of(attrs.evolve(PLAN, run_dir=RunDir(Path("/shared") / folder)), 1) == name


def test_tolerations() -> None:
    assert toleration("gpu") == {"key": "gpu", "operator": "Exists"}
    assert toleration("gpu:NoSchedule") == {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}
    assert toleration("team=rl:NoExecute") == {
        "key": "team",
        "operator": "Equal",
        "value": "rl",
        "effect": "NoExecute",
    }
