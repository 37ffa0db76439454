"""The plan of a run as Kubernetes objects.

    JobSet  controller   1 pod     ends: the JobSet is done; fails: it begins again
            engine-...   N pods    one that fails is replaced alone, up to `restarts` times
            environment  N pods    as engines
            trainer      N pods    one fails: the JobSet begins again, from the newest checkpoint

Processes that are alike and follow each other in the plan are the indexes of one Job; a pod finds its own by the
position of the first, and its index (`pod.py`). Exit codes 1 to 3 are verdicts: nothing is tried again. Pure: knows
no kubectl.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import attrs
from prl.compose.plan import LaunchPlan, Process

from prl_kubernetes import KubernetesConfig

Object = dict[str, Any]
RUN_LABEL = "prl/run"
RESTART = "jobset.sigs.k8s.io/restart-attempt"
"""Annotation that JobSet puts on its pods."""
REPLACED_ALONE = frozenset({"engine", "environment"})
VERDICTS = [1, 2, 3]
_LONGEST_NAME = 40  # a pod's name adds the Job's, indexes and a hash, within 63


@attrs.frozen(kw_only=True)
class Pods:
    """Processes of the plan that are the indexes of one Job."""

    name: str
    position: int
    """Of the first, in the plan."""
    processes: tuple[Process, ...]


def name_of(plan: LaunchPlan, attempt: int) -> str:
    """A DNS label for this launch of the run: a run that is resumed is another JobSet."""
    word = re.sub(r"[^a-z0-9]+", "-", plan.run_dir.path.name.lower()).strip("-") or "run"
    return f"{word if word[0].isalpha() else f'run-{word}'}"[:_LONGEST_NAME].rstrip("-") + f"-{attempt}"


def groups(processes: Sequence[Process]) -> list[Pods]:
    """Neighbours in the plan with the same needs."""
    found: list[Pods] = []
    position = 0
    for (role, _, _, kind), some in itertools.groupby(processes, lambda p: (p.role, p.cpus, p.gpus, p.kind)):
        members = tuple(some)
        name = f"{role}-{kind}" if kind else role
        name = f"{name}-{members[0].index}" if name in {each.name for each in found} else name
        found.append(Pods(name=name, position=position, processes=members))
        position += len(members)
    return found


def objects(plan: LaunchPlan, config: KubernetesConfig, attempt: int) -> list[Object]:
    """What `kubectl apply` is given."""
    name = name_of(plan, attempt)
    jobs = [(pods.name, _job(plan, config, name, pods)) for pods in groups(plan.processes)]
    if config.kind == "jobs":
        return [
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(config, name, f"{name}-{part}"), **template}
            for part, template in jobs
        ]
    replicated = [{"name": part, "replicas": 1, "template": template} for part, template in jobs]
    spec: Object = {
        "successPolicy": {"operator": "All", "targetReplicatedJobs": ["controller"]},
        "failurePolicy": {
            "maxRestarts": config.restarts,
            # Nothing of an attempt may live when the next one rewinds the record.
            "restartStrategy": "BlockingRecreate",
            "rules": [
                {"name": "verdict", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
            ],
        },
        "replicatedJobs": replicated,
    }
    kind = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet"}
    return [{**kind, "metadata": _metadata(config, name, name), "spec": spec}]


def _metadata(config: KubernetesConfig, run: str, name: str) -> Object:
    where = {"namespace": config.namespace} if config.namespace else {}
    return {"name": name, **where, "labels": {RUN_LABEL: run}}


def _job(plan: LaunchPlan, config: KubernetesConfig, name: str, pods: Pods) -> Object:
    """A Job's spec, under the key where it belongs."""
    count = len(pods.processes)
    alone = pods.processes[0].role in REPLACED_ALONE
    return {
        "spec": {
            "completionMode": "Indexed",
            "completions": count,
            "parallelism": count,
            "backoffLimit": config.restarts * count if alone else 0,
            "podFailurePolicy": {
                "rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": VERDICTS}}],
            },
            "template": {"metadata": {"labels": {RUN_LABEL: name}}, "spec": _pod(plan, config, name, pods)},
        }
    }


def _pod(plan: LaunchPlan, config: KubernetesConfig, name: str, pods: Pods) -> Object:
    restart = {"fieldRef": {"fieldPath": f"metadata.annotations['{RESTART}']"}}
    container: Object = {
        "name": "prl",
        "image": config.image,
        "command": [config.python, "-m", "prl_kubernetes.pod", str(plan.run_dir.path), name, str(pods.position)],
        "workingDir": config.mount,
        "env": [{"name": "PRL_RESTART", "valueFrom": restart}] if config.kind == "jobset" else [],
        "resources": _resources(config, pods.processes[0]),
        "volumeMounts": [{"name": "run", "mountPath": config.mount}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    given = {
        "serviceAccountName": config.service_account,
        "priorityClassName": config.priority_class,
        "imagePullSecrets": [{"name": secret} for secret in config.image_pull_secrets],
        "nodeSelector": dict(label.split("=", 1) for label in config.node_selector),
        "tolerations": [toleration(each) for each in config.tolerations],
    }
    return {
        "restartPolicy": "Never",
        **{key: value for key, value in given.items() if value},
        "containers": [container],
        "volumes": [
            {"name": "run", "persistentVolumeClaim": {"claimName": config.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": config.shared_memory}},
        ],
    }


def _resources(config: KubernetesConfig, process: Process) -> Object:
    """Devices and memory are limits, which are requests as well; cores are asked for and may be exceeded."""
    limits = {
        **({config.gpu: process.gpus} if process.gpus else {}),
        **({"memory": config.memory} if config.memory else {}),
    }
    return {"requests": {"cpu": process.cpus}, **({"limits": limits} if limits else {})}


def toleration(words: str) -> Object:
    """`KEY`, `KEY:EFFECT` or `KEY=VALUE:EFFECT`."""
    label, _, effect = words.partition(":")
    key, equals, value = label.partition("=")
    found = {"key": key, "operator": "Equal", "value": value} if equals else {"key": key, "operator": "Exists"}
    return {**found, **({"effect": effect} if effect else {})}
