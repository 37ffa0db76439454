"""Slurm's commands, asked in the one form that every version answers; none of them needs slurmdbd."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

import attrs
from prl.errors import InfrastructureError, UserError

TIMEOUT = 60.0  # seconds: slurmctld of a large cluster may be slow
QUEUED = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SUSPENDED"})
ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "REVOKED", "TIMEOUT"}
)
DOWN = ("down", "unk", "power", "reboot")
"""Beginnings of the states of a node that is gone. One that drains still serves the jobs it has."""


@attrs.frozen(kw_only=True)
class JobState:
    """What the queue says of a job."""

    state: str
    reason: str = ""
    nodes: str = ""
    start: str = ""
    """Expected, while it waits."""

    @property
    def waits(self) -> bool:
        return self.state in QUEUED

    @property
    def over(self) -> bool:
        return self.state in ENDED


GONE = JobState(state="COMPLETED", reason="the queue does not know it any more")


def need(*names: str) -> None:
    """UserError where Slurm is not installed, or hidden."""
    if missing := [name for name in names if shutil.which(name) is None]:
        raise UserError(f"no {' and no '.join(missing)} on PATH: launcher 'slurm' is used on a login node of a cluster")


def test(script: str) -> str:
    """When and where sbatch would start it; UserError with its reason when it never would."""
    done = _run(["sbatch", "--test-only"], stdin=script, env=outside())
    said = done.stderr.strip() or done.stdout.strip()
    if done.returncode:
        raise UserError(f"sbatch would refuse this job: {said}")
    return said.removeprefix("sbatch: ")


def submit(path: str) -> str:
    """The job's id."""
    done = _run(["sbatch", "--parsable", path], env=outside())
    if done.returncode:
        raise UserError(f"sbatch refused {path}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def state(job: str) -> JobState:
    """Of the job, or of the first component of a heterogeneous one; InfrastructureError when the queue is silent."""
    done = _run(["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T|%r|%N|%S"])
    if done.returncode:
        if "Invalid job id" in done.stderr:
            return GONE
        raise InfrastructureError(f"squeue: {done.stderr.strip()}")
    lines = done.stdout.splitlines()
    if not lines:
        return GONE
    return JobState(**dict(zip(("state", "reason", "nodes", "start"), lines[0].split("|"), strict=True)))


def part_of(job: str, host: str) -> list[str]:
    """srun's options for a step on that host, from outside the job; none where the job does not run there."""
    listed = _run(
        ["squeue", "--noheader", f"--jobs={job}", "--states=RUNNING", "--format=%i %A %N"]
    ).stdout.splitlines()
    for number, identity, nodes in (words for line in listed if len(words := line.split()) == 3):
        if host in hostnames(nodes):
            leader, _, component = number.partition("+")
            return [f"--jobid={leader}", f"--het-group={component}"] if component else [f"--jobid={identity}"]
    return []


def cancel(job: str) -> None:
    _run(["scancel", job])


def signal_step(jobs: str, name: str, signal: str) -> bool:
    """Signal the tasks of the step of that name; False when there is none."""
    listed = _run(["squeue", "--noheader", "--steps", f"--jobs={jobs}", "--format=%i %j"]).stdout.split("\n")
    steps = [line.split()[0] for line in listed if line.endswith(f" {name}")]
    for step in steps:
        _run(["scancel", f"--signal={signal}", step])
    return bool(steps)


def requeue(job: str) -> None:
    """InfrastructureError where the site does not allow it."""
    done = _run(["scontrol", "requeue", job])
    if done.returncode:
        raise InfrastructureError(f"scontrol requeue {job}: {done.stderr.strip()}")


def node_state(host: str) -> str:
    """As sinfo has it (idle, mixed, down*, ...); empty when it does not know."""
    words = _run(["sinfo", "--noheader", "--Node", f"--nodes={host}", "--format=%T"]).stdout.split()
    return words[0] if words else ""


def down(host: str) -> str:
    """The state that makes a node useless, or nothing."""
    seen = node_state(host)
    return seen if seen.startswith(DOWN) or seen.endswith("*") else ""


def hostnames(nodelist: str) -> list[str]:
    """`node[1-3]` spelt out."""
    return _run(["scontrol", "show", "hostnames", nodelist]).stdout.split()


def outside() -> dict[str, str]:
    """An environment in which sbatch is not inside a job, whose options it would otherwise inherit."""
    kept = ("SLURM_CONF",)
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
    return ours | {key: os.environ[key] for key in kept if key in os.environ}


def _run(
    command: Sequence[str], *, stdin: str | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, input=stdin, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except FileNotFoundError:
        raise InfrastructureError(f"there is no {command[0]} here") from None
    except subprocess.TimeoutExpired:
        raise InfrastructureError(f"{command[0]} did not answer within {TIMEOUT:.0f} s") from None
