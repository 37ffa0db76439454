"""Plugin `kubernetes`: the run as a JobSet. `launcher.py` serves whoever launches and watches it, `pod.py` is a pod."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

import attrs
from prl import hookimpl, option
from prl.compose.config import LauncherConfig, Run, not_negative
from prl.providers import Launcher


@attrs.frozen(kw_only=True)
class KubernetesConfig(LauncherConfig):
    """`[launcher] type = "kubernetes"`."""

    spans_hosts: ClassVar[bool] = True

    image: str = option(help="container image with prl and the run's plugins, as they are where the run is launched")
    claim: str = option(help="PersistentVolumeClaim, ReadWriteMany, on which the run directory lies")
    mount: str = option(help="where pods mount the claim: the same path as where the run is launched")
    kind: Literal["jobset", "jobs"] = option(
        "jobset", help="jobset: one JobSet, which begins again when it loses its trainer; jobs: plain Jobs"
    )
    namespace: str = option("", help="by default kubectl's own")
    python: str = option("python", help="the interpreter in the image")
    gpu: str = option("nvidia.com/gpu", help="resource name of a device")
    memory: str = option("", help="memory of every pod, such as 64Gi")
    shared_memory: str = option("8Gi", help="size of /dev/shm")
    restarts: int = option(10, help="times the JobSet may begin again, and an engine's pod", validator=not_negative)
    node_selector: tuple[str, ...] = option((), help="KEY=VALUE labels that nodes must have")
    tolerations: tuple[str, ...] = option((), help="taints to tolerate: KEY, KEY:EFFECT or KEY=VALUE:EFFECT")
    service_account: str = option("", help="as serviceAccountName")
    image_pull_secrets: tuple[str, ...] = option((), help="names of secrets")
    priority_class: str = option("", help="as priorityClassName")


@hookimpl
def prl_launchers() -> list[Launcher]:
    return [
        Launcher(
            name="kubernetes",
            config=KubernetesConfig,
            summary="a JobSet, or plain Jobs, of a Kubernetes cluster; printed, or handed to kubectl",
            build="prl_kubernetes.launcher:build",
        )
    ]


@hookimpl
def prl_validate(run: Run) -> Iterable[str]:
    """What no cluster could run."""
    config = run.launcher
    if not isinstance(config, KubernetesConfig):
        return
    if not config.mount.startswith("/"):
        yield f"launcher.mount must be an absolute path, got {config.mount!r}"
    if run.run.network == "loopback":
        yield "run.network = 'loopback' cannot be reached from another pod; leave it out"
    yield from (
        f"launcher.node_selector: {label!r} is not KEY=VALUE" for label in config.node_selector if "=" not in label
    )
