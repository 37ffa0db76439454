"""On the login node: what is submitted, what the queue says of it, how it is taken back.

<run>/launch.json      the job's id, and that this launcher knows it
<run>/slurm/           job.sh, node.sh, job.log, turns.jsonl
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import attrs
from prl.compose.plan import LaunchPlan
from prl.errors import InfrastructureError, UserError
from prl.run_dir import RunDir, read_json

from prl_slurm import SlurmConfig, commands, disk, script, steps
from prl_slurm.allocation import requests
from prl_slurm.commands import GONE, JobState

_FRESH_SECONDS = 2.0


def build(config: SlurmConfig, run_dir: Path) -> SlurmLauncher:
    """`[launcher] type = "slurm"`; the plan names the run directory."""
    del run_dir
    return SlurmLauncher(config)


@attrs.frozen
class SlurmLauncher:
    """A `ProcessLauncher` that hands the run to Slurm and returns."""

    config: SlurmConfig

    def render(self, plan: LaunchPlan) -> str:
        """The two files as they would be submitted."""
        files = {"job.sh": script.job(plan, self.config), "node.sh": script.node(self.config, plan.run_dir.path)}
        return "\n".join(f"--- slurm/{name}\n{text}" for name, text in files.items()).rstrip()

    def check(self, plan: LaunchPlan) -> None:
        """UserError with what Slurm would say after the run directory was made, or worse, never."""
        commands.need("sbatch", "squeue", "scancel", "scontrol")
        container = self.config.container
        if container.image.startswith("/") and not Path(container.image).exists():
            raise UserError(f"launcher.container.image: there is no {container.image}")
        if self.config.venv and not Path(self.config.venv).is_absolute():
            raise UserError(f"launcher.venv: {self.config.venv!r} must be an absolute path: nodes start elsewhere")
        if problem := disk.no_room(plan.run_dir.path, self.config.free_gb):
            raise UserError(f"run.dir: {problem}")
        commands.test(script.job(plan, self.config))

    def follows(self, run_dir: RunDir) -> bool:
        """A job can wait for another job."""
        return (read_json(run_dir.launch) or {}).get("launcher") == "slurm"

    def launch(self, plan: LaunchPlan) -> int:
        """Submit, and say what comes next."""
        folder = self._prepare(plan)
        (folder / "job.sh").write_text(script.job(plan, self.config))
        job = commands.submit(str(folder / "job.sh"))
        self._remember(plan, job)
        nodes = sum(request.nodes for request in requests(plan, self.config))
        print(f"submitted as job {job} for {nodes} nodes; `prl status`, `prl logs -f`, `prl stop`", flush=True)
        return 0

    def launch_all(self, plans: Sequence[LaunchPlan], folder: Path) -> int:
        """A sweep as one job array; each run knows its element."""
        text = script.array(plans, self.config, folder)
        (folder / "slurm").mkdir(exist_ok=True)
        (folder / "slurm" / "runs").write_text("".join(f"{plan.run_dir.path}\n" for plan in plans))
        (folder / "slurm" / "array.sh").write_text(text)
        for plan in plans:
            self._prepare(plan)
        job = commands.submit(str(folder / "slurm" / "array.sh"))
        for index, plan in enumerate(plans):
            self._remember(plan, f"{job}_{index}")
        print(f"submitted as job array {job} of {len(plans)} runs", flush=True)
        return 0

    def _prepare(self, plan: LaunchPlan) -> Path:
        folder = plan.run_dir.path / "slurm"
        folder.mkdir(exist_ok=True)
        (folder / "node.sh").write_text(script.node(self.config, plan.run_dir.path))
        return folder

    def _remember(self, plan: LaunchPlan, job: str) -> None:
        plan.run_dir.write_json(plan.run_dir.launch, {"launcher": "slurm", "job": job, "submitted": time.time()})

    def remote(self, run_dir: RunDir) -> SlurmRun:
        """The run in the queue."""
        return SlurmRun(run_dir, (read_json(run_dir.launch) or {})["job"], self.config)


@attrs.define
class SlurmRun:
    """A `prl.providers.RemoteRun`. The queue is asked at most every two seconds."""

    run_dir: RunDir
    job: str
    config: SlurmConfig
    _seen: JobState = GONE
    _asked: float = float("-inf")

    def _state(self) -> JobState:
        if time.monotonic() - self._asked > _FRESH_SECONDS:
            self._seen, self._asked = commands.state(self.job), time.monotonic()
        return self._seen

    def rows(self) -> list[list[str]]:
        """What the queue says, for `prl status`."""
        try:
            state = self._state()
        except InfrastructureError as error:
            return [["job", f"{self.job}, of which the queue says nothing: {error}"]]
        reason = f" ({state.reason})" if state.reason not in ("", "None") else ""
        start = f", expected to start {state.start}" if state.waits and state.start not in ("", "N/A") else ""
        nodes = f" on {state.nodes}" if state.nodes else ""
        return [["job", f"{self.job} {state.state}{reason}{nodes}{start}"]]

    def over(self) -> bool:
        """Whether nothing of it runs or waits to run."""
        return self._state().over

    def stop(self) -> None:
        """After the stop file: what waits is taken out of the queue; what runs makes its cut and ends by itself."""
        if self._state().waits:
            commands.cancel(self.job)
            state = read_json(self.run_dir.state) or {}
            state |= {"status": "stopped", "error": "cancelled while it waited in the queue", "updated": time.time()}
            self.run_dir.write_json(self.run_dir.state, state)

    def cancel(self) -> None:
        """End it now, whatever it is at."""
        commands.cancel(self.job)

    def attach(self, process: str, host: str, arguments: Sequence[str]) -> int:
        """A step of the job on that host, in the environment of node.sh and, where there is one, the container."""
        part = commands.part_of(self.job, host)
        if not part:
            raise UserError(f"job {self.job} has {host} no more, where {process} was: prl status")
        words = steps.interactive(part, self.config, self.run_dir.path, host, arguments, pty=sys.stdin.isatty())
        return subprocess.call(words)
