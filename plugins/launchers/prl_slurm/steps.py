"""A process of the run as a step of the job: one srun per process, so that the loss of one ends no other.

srun stays in the job's own process tree and ends with its task's exit code. A signal to srun would kill its task
without a grace; signals go to the task through scancel instead. Used by the job's own process.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import attrs
from prl.errors import InfrastructureError

from prl_slurm import SlurmConfig, commands
from prl_slurm.allocation import Place
from prl_slurm.script import python, pyxis

SRUN = {"SLURM_EXIT_ERROR": str(InfrastructureError.exit_code)}
"""What srun itself could not do is no verdict of the process on the run."""


_STEP = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--overlap", "--mem=0"]
"""One task. It shares its node with the run's other steps: the plan has divided it already."""


@attrs.frozen(kw_only=True)
class Job:
    """The job this process runs in."""

    id: str
    components: tuple[tuple[str, ...], ...]
    """Hosts of each component, in Slurm's order."""
    restarts: int
    """How often it was queued again."""

    @classmethod
    def ours(cls) -> Job:
        """From the environment that Slurm gives to a batch script."""
        size = int(os.environ.get("SLURM_HET_SIZE", "0"))
        names = [f"SLURM_JOB_NODELIST_HET_GROUP_{index}" for index in range(size)] or ["SLURM_JOB_NODELIST"]
        return cls(
            id=_own_id(os.environ),
            components=tuple(tuple(commands.hostnames(os.environ[name])) for name in names),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        )

    @property
    def heterogeneous(self) -> bool:
        return len(self.components) > 1

    @property
    def ids(self) -> str:
        """Of every component, as squeue wants them."""
        if not self.heterogeneous:
            return self.id
        return ",".join(str(int(self.id) + index) for index in range(len(self.components)))

    def where(self, host: str) -> int:
        """The component that has the host."""
        return next(index for index, hosts in enumerate(self.components) if host in hosts)


def _own_id(environment: Mapping[str, str]) -> str:
    """One element of an array must be named as such: the number of its last one means the whole array."""
    array, element = (environment.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    if array and element:
        return f"{array}_{element}"
    return environment.get("SLURM_HET_JOB_ID") or environment["SLURM_JOB_ID"]


@attrs.frozen(kw_only=True)
class Step:
    """A started step: what the supervisor of a run waits for and ends."""

    name: str
    host: str
    job: Job
    popen: subprocess.Popen[Any]

    @property
    def pid(self) -> int:
        """Of its srun."""
        return self.popen.pid

    def wait(self) -> int:
        """The task's exit code; negative for the signal that ended it."""
        code = self.popen.wait()
        if code == 0 and commands.down(self.host):
            return InfrastructureError.exit_code  # srun calls it success when it was the node that failed
        # srun, like a shell, answers 128 + signal.
        return 128 - code if code > 128 and code - 128 in set(signal.Signals) else code

    def terminate(self) -> None:
        """SIGTERM to the task; to srun when there is no task yet."""
        if self.popen.poll() is None and not commands.signal_step(self.job.ids, self.name, "TERM"):
            self.popen.terminate()

    def kill(self) -> None:
        """The task and everything it started: Slurm ends what belongs to the step."""
        if self.popen.poll() is None:
            commands.signal_step(self.job.ids, self.name, "KILL")
            self.popen.kill()


def start(
    job: Job,
    config: SlurmConfig,
    run: Path,
    name: str,
    place: Place,
    argv: Sequence[str],
    *,
    gpus: int = 0,
    env: Mapping[str, str] | None = None,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    text: bool = False,
) -> Step:
    """Start `argv` (whose first word is a Python) on its node, in the environment of node.sh."""
    popen = subprocess.Popen(
        command(job, config, run, name, place, argv, gpus=gpus),
        env={**os.environ, "PYTHONUNBUFFERED": "1", **SRUN, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        text=text,
        start_new_session=True,
    )
    return Step(name=name, host=place.host, job=job, popen=popen)


def guard(job: Job, config: SlurmConfig, host: str, watched: str) -> Step:
    """Start `guard.py` on a node, outside any container: it speaks to Slurm."""
    words = [*_srun(job, "guard", Place(host=host, component=job.where(host), first_gpu=0)), python(config)]
    popen = subprocess.Popen([*words, "-m", "prl_slurm.guard", job.id, watched], stdin=subprocess.DEVNULL)
    return Step(name="guard", host=host, job=job, popen=popen)


def command(
    job: Job, config: SlurmConfig, run: Path, name: str, place: Place, argv: Sequence[str], *, gpus: int = 0
) -> list[str]:
    """The srun of a process of the run."""
    devices = [python(config), "-m", "prl_slurm.task", f"{place.first_gpu}:{gpus}"]
    inner = ["bash", str(run / "slurm" / "node.sh"), *devices, python(config), *argv[1:]]
    return [*_srun(job, name, place), *pyxis(config, run), *inner]


def interactive(
    part: Sequence[str], config: SlurmConfig, run: Path, host: str, arguments: Sequence[str], *, pty: bool
) -> list[str]:
    """The srun of a Python beside the run's processes, from outside the job, of which `part` says what to join.

    `pty`: with a terminal of its own.
    """
    where = ["srun", *part, f"--nodelist={host}", *_STEP, "--job-name=attach", *(["--pty"] if pty else [])]
    return [*where, *pyxis(config, run), "bash", str(run / "slurm" / "node.sh"), python(config), *arguments]


def _srun(job: Job, name: str, place: Place) -> list[str]:
    """A step of the job that this process runs in."""
    component = [f"--het-group={place.component}"] if job.heterogeneous else []
    return [
        "srun",
        *component,
        *_STEP,
        f"--nodelist={place.host}",
        f"--job-name={name}",
        "--export=ALL",
        "--input=none",
    ]
