"""`prl stop [RUN]`: ask a run to end after its current step, with a checkpoint, and wait until it has.

A run that waits in a queue is taken out of it.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from prl.cli.runs import add_run_argument, find_run, is_over, remote, state_of

POLL_SECONDS = 0.2


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("stop", help="end a run after its current step", description=__doc__)
    add_run_argument(parser)
    parser.add_argument("--no-wait", action="store_true", help="ask, and do not wait for the end")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    run_dir = find_run(arguments.directory)
    if is_over(run_dir):
        print(f"{run_dir.path} is over already: {state_of(run_dir)['status']}")
        return 0
    run_dir.stop.touch()
    print(f"asked {run_dir.path} to stop", flush=True)
    if (there := remote(run_dir)) is not None:
        there.stop()
    while not arguments.no_wait and not is_over(run_dir):
        time.sleep(POLL_SECONDS)
        if there is not None:
            there.stop()  # it may have gone back into the queue, for a reason of its own
    if not arguments.no_wait:
        print(state_of(run_dir)["status"])
    return 0
