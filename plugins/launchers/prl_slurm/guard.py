"""`python -m prl_slurm.guard JOB HOST`: on another node, queue the job again when the node of its own process is gone.

A job that outlives lost nodes (`--no-kill`) is also left to itself by Slurm when it loses the node of its batch script:
it would hold the others until its time is over, with nobody to end it. Imports nothing heavy; ended with the job.
"""

from __future__ import annotations

import sys
import time

from prl_slurm import commands

_LOOK_SECONDS = 10.0


def main(job: str, host: str) -> None:
    """InfrastructureError when the job may not queue again; it then waits for its time limit."""
    while not commands.down(host):
        time.sleep(_LOOK_SECONDS)
    commands.requeue(job)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
