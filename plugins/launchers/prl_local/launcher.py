"""Start a run's processes here. What becomes of them is `prl.supervise`'s to decide.

Each child leads a session of its own, so the terminal's Ctrl-C reaches only the supervising process, and everything
that a child started can be ended with it.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import attrs
from prl.compose.plan import LaunchPlan, Process
from prl.supervise.supervisor import supervise

from prl_local import devices

GRACE_SECONDS = 10.0


def build(config: object, run_dir: Path) -> LocalLauncher:
    """`[launcher] type = "local"`; the plan names the run directory."""
    del config, run_dir
    return LocalLauncher()


@attrs.frozen
class LocalProcess:
    """A `prl.supervise.children.Handle`."""

    popen: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def host(self) -> str:
        return socket.gethostname()

    def wait(self) -> int:
        return self.popen.wait()

    def terminate(self) -> None:
        self.popen.terminate()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)


@attrs.frozen(kw_only=True)
class LocalLauncher:
    """A `ProcessLauncher` for one machine."""

    grace: float = GRACE_SECONDS
    """Seconds that processes have to end by themselves, and again after SIGTERM."""

    def render(self, plan: LaunchPlan) -> str:
        """One line per process: name, what it is given, environment and command."""
        lines = []
        for process in devices.placed(plan.processes):
            environment = " ".join(f"{key}={value}" for key, value in process.env.items())
            cores = f"{process.cpus} cpu" + (f", {process.gpus} gpu" if process.gpus else "")
            lines.append(f"  {process.name:<14} {cores:<7} {environment} {shlex.join(process.argv)}")
        return "\n".join(lines)

    def check(self, plan: LaunchPlan) -> None:
        """This machine starts whatever it is told to."""

    def launch(self, plan: LaunchPlan) -> int:
        """Run the processes of the plan; the exit code of the run."""
        own = attrs.evolve(plan, processes=devices.placed(plan.processes))
        return supervise(own, spawn, grace=self.grace)


def spawn(process: Process, log: Path) -> LocalProcess:
    """A process of this machine; the controller's standard output is the user's."""
    with log.open("ab") as file:
        popen = subprocess.Popen(
            process.argv,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **process.env},
            stdin=subprocess.DEVNULL,
            stdout=None if process.role == "controller" else file,
            stderr=file,
            start_new_session=True,
        )
    return LocalProcess(popen)
