"""`prl resume [RUN]`: a stopped, failed or killed run goes on in its own directory from its newest checkpoint.

RUN may also be the folder of a sweep: each of its runs that has not finished goes on.
"""

from __future__ import annotations

import argparse
import socket
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prl.cli.launch import INTERRUPTED, add_edit_arguments
from prl.cli.runs import FINAL, add_run_argument, alive, find_run, remote, state_of, sweep_of
from prl.errors import PrlError, UserError
from prl.run_dir import RunDir, read_json
from prl.supervise.claim import ClaimedError, claimed

if TYPE_CHECKING:
    from prl.compose.compose import Composition

ENDING_SECONDS = 5.0
"""What is left of a run that was killed ends itself within this time."""
POLL_SECONDS = 0.1


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("resume", help="go on with a run that ended early", description=__doc__)
    add_run_argument(parser)
    add_edit_arguments(parser)
    parser.add_argument(
        "--relock", action="store_true", help="accept that plugins or libraries changed, and rewrite plugins.lock"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    members = sweep_of(arguments.directory)
    if not members:
        return _resume(arguments, find_run(arguments.directory))
    worst = 0
    for run_dir in members:
        code = _resume_member(arguments, run_dir)
        if code == INTERRUPTED:
            return code
        worst = max(worst, code)
    return worst


def _resume_member(arguments: argparse.Namespace, run_dir: RunDir) -> int:
    """One that cannot go on says so, and does not keep the next from it."""
    if state_of(run_dir)["status"] == "finished":
        print(f"{run_dir.path} has finished", flush=True)
        return 0
    try:
        return _resume(arguments, run_dir)
    except PrlError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _resume(arguments: argparse.Namespace, run_dir: RunDir) -> int:
    try:
        with claimed(run_dir, patience=ENDING_SECONDS):
            refuse_living(run_dir, patience=ENDING_SECONDS)
            return _go_on(arguments, run_dir)
    except ClaimedError:
        refuse_living(run_dir, patience=0.0)  # says who lives
        raise


def _go_on(arguments: argparse.Namespace, run_dir: RunDir) -> int:
    from prl.cli.start import start
    from prl.compose.plan import plan
    from prl.compose.resume import resume

    def check(composition: Composition) -> None:
        composition.build(composition.run.launcher, run_dir.path).check(plan(composition, run_dir))

    edits = {"plugins": arguments.plugins, "overrides": arguments.set, "relock": arguments.relock}
    attempt = resume(run_dir, check=check, **edits)
    if attempt.relocked:
        print(f"plugins.lock was rewritten; {attempt.relocked.splitlines()[0]}", flush=True)
        print("\n".join(attempt.relocked.splitlines()[1:-1]), flush=True)
    print(f"run directory: {run_dir.path}, attempt {attempt.number} from step {attempt.step}", flush=True)
    composition = attempt.composition
    launcher = composition.build(composition.run.launcher, run_dir.path)
    run_dir.launch.unlink(missing_ok=True)  # what took the last attempt over has nothing to say about this one
    return start(launcher, plan(composition, run_dir))


def refuse_living(run_dir: RunDir, *, patience: float) -> None:
    """UserError when a process of the run still lives after `patience` seconds."""
    deadline = time.monotonic() + patience
    there = remote(run_dir)
    if there is not None:
        while not there.over():
            if time.monotonic() > deadline:
                said = "; ".join(" ".join(row) for row in there.rows())
                raise UserError(f"{run_dir.path} is still going: {said}; `prl stop` ends it")
            time.sleep(POLL_SECONDS)
        return
    while (left := _left(run_dir)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    if left:
        names = ", ".join(f"{p['role']}-{p['index']} (pid {p['pid']} on {p['host']})" for p in left)
        elsewhere = any(process["host"] != socket.gethostname() for process in left)
        known = f"; if those of another host are gone, remove {run_dir.processes}" if elsewhere else ""
        raise UserError(f"{run_dir.path} is still going: {names}; `prl stop` ends it{known}")


def _left(run_dir: RunDir) -> list[Mapping[str, Any]]:
    """Processes that live, or may: what another host does can only be believed once the run has said its last word."""
    processes = [p for p in read_json(run_dir.processes) or () if alive(p, run_dir)]
    if state_of(run_dir)["status"] in FINAL:
        return [process for process in processes if process["host"] == socket.gethostname()]
    return processes
