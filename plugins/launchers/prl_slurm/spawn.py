"""On which node a process lives, and lives again: what `prl.supervise` is given to start processes with.

A process whose node is gone moves to a spare. Without one, an engine or environment worker stays away and the run goes
on with fewer, and the next attempt begins with fewer trainer nodes. Where [failures] or the mesh do not allow that, and
where an attempt would begin without an engine's node, the job goes back into the queue.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import attrs
from prl.compose.plan import Process
from prl.errors import InfrastructureError
from prl.run_dir import RunDir

from prl_slurm import SlurmConfig, commands, steps
from prl_slurm.allocation import Nodes, Place
from prl_slurm.steps import Job, Step

_ANSWER_SECONDS = 30.0


class NoNodeError(InfrastructureError):
    """The attempt has no node for one of its processes."""


@attrs.frozen(kw_only=True)
class Absent:
    """A process that could not be started; it has ended already."""

    host: str
    pid: int = -1

    def wait(self) -> int:
        return InfrastructureError.exit_code

    def terminate(self) -> None:
        """There is nothing to ask."""

    def kill(self) -> None:
        """There is nothing to end."""


@attrs.define
class Spawner:
    """`prl.supervise`'s `spawn`."""

    job: Job
    config: SlurmConfig
    run_dir: RunDir
    nodes: Nodes
    _alive: dict[str, Step] = attrs.field(factory=dict)
    """Name of a process -> its newest life."""
    _attempt: int = 0

    def __call__(self, process: Process, log: Path) -> Step | Absent:
        """NoNodeError where an attempt cannot begin."""
        attempt = max(self.run_dir.attempts(), default=1)
        if attempt != self._attempt:
            self._attempt, self._alive = attempt, {}
        earlier = self._alive.get(process.name)
        if earlier is not None:
            self._look_at([earlier.host])
        try:
            place = self.nodes.place(process)
        except InfrastructureError as error:
            if earlier is None:
                raise NoNodeError(str(error)) from error
            with log.open("a") as file:
                file.write(f"{error}\n")
            return Absent(host=earlier.host)
        self._alive[process.name] = step = self._start(process, place, log)
        return step

    def _start(self, process: Process, place: Place, log: Path) -> Step:
        with log.open("ab") as file:
            return steps.start(
                *(self.job, self.config, self.run_dir.path, process.name, place, process.argv),
                gpus=process.gpus,
                env=process.env,
                stdout=file,
                stderr=file,
            )

    # --- nodes --------------------------------------------------------------------------------------------------------
    def trainer_nodes(self) -> int:
        """How many there are for the next attempt; the plan's first ones are those."""
        self._look_at_all()
        return self.nodes.close_up("trainer")

    def _look_at_all(self) -> None:
        """Those that are down, and those where something of the last attempt failed."""
        failed = [step.host for step in self._alive.values() if step.popen.poll()]
        for host in [*self.nodes.spares, *self.nodes.hosts]:
            if state := commands.down(host):
                self.nodes.lose(host, f"is {state.rstrip('*')}")
        self._look_at(list(dict.fromkeys(failed)))

    def _look_at(self, hosts: list[str]) -> None:
        for host in hosts:
            if host not in self.nodes.lost and (reason := self._gone(host)):
                self.nodes.lose(host, reason)

    def _gone(self, host: str) -> str:
        """Why nothing can be started there, or nothing."""
        if state := commands.down(host):
            return f"is {state.rstrip('*')}"
        place = Place(host=host, component=self.job.where(host), first_gpu=0)
        step = steps.start(self.job, self.config, self.run_dir.path, "answer", place, ["python", "-c", ""])
        try:
            return f"starts nothing (srun: {code})" if (code := step.popen.wait(_ANSWER_SECONDS)) else ""
        except subprocess.TimeoutExpired:
            step.kill()
            return f"did not answer within {_ANSWER_SECONDS:.0f} s"
