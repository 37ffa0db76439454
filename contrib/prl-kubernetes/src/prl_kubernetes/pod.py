"""`python -m prl_kubernetes.pod RUN NAME POSITION`: the process of a pod becomes a process of the run.

    controller, first time      says that the attempt has begun
    controller, begun again     makes the run ready to go on, as `prl resume` does, then says so
    everybody else              waits for that

A pod that takes the place of another engine's or environment worker's tells the controller that its predecessor is
gone. Which process of the plan it is: the one at POSITION, plus the index that the Job gives to its pods.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from prl.compose.compose import Composition, open_run
from prl.compose.plan import Process, plan
from prl.compose.resume import resume
from prl.errors import PrlError
from prl.run_dir import RunDir
from prl.supervise import casualties
from prl.supervise.beats import Pulse
from prl.supervise.casualties import Casualty

from prl_kubernetes.manifest import REPLACED_ALONE

_POLL_SECONDS = 0.2


def main(run_dir: RunDir, name: str, position: int) -> int:
    """Returns only where it cannot become the process."""
    restart = int(os.environ.get("PRL_RESTART") or 0)
    begun = run_dir.path / "kubernetes" / f"{name}-{restart}.begun"
    position += int(os.environ.get("JOB_COMPLETION_INDEX") or 0)
    try:
        composition = _begin(run_dir, begun, restart) if position == 0 else _follow(run_dir, begun)
        process = plan(composition, run_dir).processes[position]
    except PrlError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if process.role in REPLACED_ALONE:
        tell_of_predecessor(run_dir, process)
    return _become(process)


def _become(process: Process) -> NoReturn:
    os.execvpe(process.argv[0], process.argv, {**os.environ, "PYTHONUNBUFFERED": "1", **process.env})


def _begin(run_dir: RunDir, begun: Path, restart: int) -> Composition:
    """In the controller's pod, the plan's first."""
    composition = resume(run_dir).composition if restart and not begun.exists() else open_run(run_dir)
    begun.parent.mkdir(exist_ok=True)
    begun.touch()
    return composition


def _follow(run_dir: RunDir, begun: Path) -> Composition:
    while not begun.exists():
        time.sleep(_POLL_SECONDS)
    return open_run(run_dir)


def tell_of_predecessor(run_dir: RunDir, process: Process) -> None:
    """Of this attempt: what an earlier one's left was removed when this one was made ready."""
    pid = Pulse(run_dir, clock=time.monotonic).pid(process.name)
    if pid < 0:
        return
    casualty = Casualty(
        attempt=max(run_dir.attempts(), default=1),
        role=process.role,
        index=process.index,
        pid=pid,
        sentence=f"{process.name}: its pod ended",
        done="another pod took its place",
        at=time.time(),
    )
    casualties.append(run_dir, casualty)


if __name__ == "__main__":
    sys.exit(main(RunDir(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
