"""Where a run is launched from: the manifest, handed to kubectl where there is one, and what kubectl says of the run.

<run>/launch.json                 the name of the JobSet, and that this launcher knows it
<run>/kubernetes/manifest.yaml    what was applied, or is to be
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import yaml  # type: ignore[import-untyped]
from prl.compose.plan import LaunchPlan
from prl.errors import InfrastructureError, UserError
from prl.run_dir import RunDir, read_json

from prl_kubernetes import KubernetesConfig
from prl_kubernetes.manifest import RUN_LABEL, groups, name_of, objects

_TIMEOUT = 60.0  # seconds that a cluster has to answer
_FRESH_SECONDS = 2.0


def build(config: KubernetesConfig, run_dir: Path) -> KubernetesLauncher:
    """`[launcher] type = "kubernetes"`; the plan names the run directory."""
    del run_dir
    return KubernetesLauncher(config)


@attrs.frozen
class KubernetesLauncher:
    """A `ProcessLauncher` that hands the run to a cluster and returns."""

    config: KubernetesConfig

    def render(self, plan: LaunchPlan) -> str:
        text: str = yaml.safe_dump_all(objects(plan, self.config, self._attempt(plan)), sort_keys=False)
        return text.rstrip()

    def check(self, plan: LaunchPlan) -> None:
        """UserError when pods would not see the run."""
        if not plan.run_dir.path.is_relative_to(self.config.mount):
            raise UserError(f"run.dir: {plan.run_dir.path} does not lie below launcher.mount ({self.config.mount})")
        if shutil.which("kubectl"):
            kubectl(self.config, "apply", "--dry-run=server", "-f", "-", stdin=self.render(plan))

    def launch(self, plan: LaunchPlan) -> int:
        """Apply the manifest, or say how."""
        attempt = self._attempt(plan)
        folder = plan.run_dir.path / "kubernetes"
        folder.mkdir(exist_ok=True)
        file = folder / "manifest.yaml"
        file.write_text(f"{self.render(plan)}\n")
        known = {"launcher": "kubernetes", "name": name_of(plan, attempt), "submitted": time.time()}
        places = {
            process.name: [pods.name, index]
            for pods in groups(plan.processes)
            for index, process in enumerate(pods.processes)
        }
        plan.run_dir.write_json(plan.run_dir.launch, known | {"pods": places})
        if shutil.which("kubectl") is None:
            print(f"there is no kubectl here; where there is one: kubectl apply -f {file}", flush=True)
            return 0
        print(kubectl(self.config, "apply", "-f", str(file)).strip(), flush=True)
        return 0

    @staticmethod
    def _attempt(plan: LaunchPlan) -> int:
        return max(plan.run_dir.attempts(), default=1)

    def remote(self, run_dir: RunDir) -> KubernetesRun:
        return KubernetesRun(run_dir, self.config, read_json(run_dir.launch) or {})


@attrs.define
class KubernetesRun:
    """A `prl.providers.RemoteRun`. The cluster is asked at most every two seconds."""

    run_dir: RunDir
    config: KubernetesConfig
    launched: Mapping[str, Any]
    _seen: list[Mapping[str, Any]] = attrs.field(factory=list)
    _asked: float = float("-inf")

    def _objects(self) -> list[Mapping[str, Any]]:
        """The JobSet, or the Jobs, that are there."""
        if time.monotonic() - self._asked > _FRESH_SECONDS:
            kind = "jobsets.jobset.x-k8s.io" if self.config.kind == "jobset" else "jobs"
            self._seen, self._asked = self._get(kind), time.monotonic()
        return self._seen

    def _get(self, kind: str, *labels: str) -> list[Mapping[str, Any]]:
        selector = ",".join([f"{RUN_LABEL}={self.launched['name']}", *labels])
        found: list[Mapping[str, Any]] = json.loads(kubectl(self.config, "get", kind, "-l", selector, "-o", "json"))[
            "items"
        ]
        return found

    def rows(self) -> list[list[str]]:
        """What the cluster says, for `prl status`."""
        try:
            seen = self._objects()
        except InfrastructureError as error:
            return [["cluster", str(error)]]
        if not seen:
            return [["cluster", f"has no {self.launched['name']} any more"]]
        return [[each["kind"].lower(), f"{each['metadata']['name']} {_state(each)}"] for each in seen]

    def over(self) -> bool:
        """Whether nothing of it runs or waits to run."""
        return all(_terminal(each) for each in self._objects())

    def stop(self) -> None:
        """After the stop file: what has no pod that runs is removed; what runs makes its cut and ends by itself."""
        if not any(pod["status"].get("phase") == "Running" for pod in self._get("pods")):
            self.cancel()

    def cancel(self) -> None:
        """Remove it now, whatever it is at."""
        for each in self._objects():
            kubectl(self.config, "delete", each["kind"].lower(), each["metadata"]["name"], "--wait=false")
        self._asked = float("-inf")

    def attach(self, process: str, host: str, arguments: Sequence[str]) -> int:
        """kubectl exec in the pod of that process."""
        del host
        part, index = self.launched["pods"].get(process, ("", -1))
        pods = self._get("pods", f"batch.kubernetes.io/job-completion-index={index}") if part else []
        running = [pod for pod in pods if part in _job_of(pod) and pod["status"].get("phase") == "Running"]
        if not running:
            raise UserError(f"no pod of {process} runs; the run has {', '.join(self.launched['pods'])}")
        terminal = ["-it"] if sys.stdin.isatty() else ["-i"]
        inside = ["exec", *terminal, running[-1]["metadata"]["name"], "--", self.config.python, *arguments]
        return subprocess.call(["kubectl", *_namespace(self.config), *inside])


def _job_of(pod: Mapping[str, Any]) -> list[str]:
    """Names by which its Job may be known: of the JobSet's part, or its own, which ends in it."""
    labels = pod["metadata"]["labels"]
    own = str(labels.get("batch.kubernetes.io/job-name", "")).removeprefix(f"{labels[RUN_LABEL]}-")
    return [str(labels.get("jobset.sigs.k8s.io/replicatedjob-name", "")), own]


def _terminal(each: Mapping[str, Any]) -> str:
    """`Completed`, `Failed`, or nothing while it goes on."""
    status = each.get("status", {})
    if each["kind"] == "JobSet":
        return str(status.get("terminalState", ""))
    ended = [c["type"] for c in status.get("conditions", ()) if c["status"] == "True" and c["type"] in _ENDS]
    return ended[0] if ended else ""


_ENDS = ("Complete", "Failed")


def _state(each: Mapping[str, Any]) -> str:
    status = each.get("status", {})
    parts = [f"{part['name']} {part.get('ready', 0)} ready" for part in status.get("replicatedJobsStatus", ())]
    parts += [f"{status['restarts']} restarts"] if status.get("restarts") else []
    parts += [f"{status['active']} active"] if status.get("active") else []
    return _terminal(each) or ", ".join(parts) or "waits"


def kubectl(config: KubernetesConfig, *words: str, stdin: str | None = None) -> str:
    """Its standard output; InfrastructureError with what it said instead."""
    command = ["kubectl", *_namespace(config), *words]
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except FileNotFoundError:
        raise InfrastructureError("there is no kubectl here") from None
    except subprocess.TimeoutExpired:
        raise InfrastructureError(f"kubectl {words[0]} did not answer within {_TIMEOUT:.0f} s") from None
    if done.returncode:
        raise InfrastructureError(f"kubectl {words[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _namespace(config: KubernetesConfig) -> list[str]:
    return [f"--namespace={config.namespace}"] if config.namespace else []
