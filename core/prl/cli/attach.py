"""`prl attach [RUN] [PROCESS]`: a shell where a process of a run lives, in that process's environment.

PROCESS is a name of `prl status`, such as engine-1; by default the controller. `-c COMMAND` runs one command instead,
and `--stacks` says where every thread of the process stands. The process itself is not disturbed.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
from typing import Any

from prl.cli.runs import add_run_argument, find_run, is_run, remote
from prl.errors import UserError
from prl.run_dir import RunDir, read_json
from prl.supervise import attach

DEFAULT = "controller-0"


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("attach", help="a shell beside a process of a run", description=__doc__)
    add_run_argument(parser)
    parser.add_argument("process", nargs="?", metavar="PROCESS", help="such as engine-1; by default the controller")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "-c", dest="command", default="", metavar="COMMAND", help="run this, and not an interactive shell"
    )
    what.add_argument("--stacks", action="store_true", help="print the stack of every thread of the process")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    run_dir, name = _meant(arguments.directory, arguments.process)
    hosts = {f"{each['role']}-{each['index']}": str(each["host"]) for each in read_json(run_dir.processes) or ()}
    there = remote(run_dir)
    if name not in hosts and (hosts or there is None):
        raise UserError(f"{run_dir.path} has no process {name!r}; it has {', '.join(hosts) or 'none that was started'}")
    words = attach.arguments(run_dir, name, stacks=arguments.stacks, command=arguments.command)
    if there is not None:
        return there.attach(name, hosts.get(name, ""), words)
    if hosts[name] != socket.gethostname():
        raise UserError(f"{name} of {run_dir.path} runs on {hosts[name]}: ask there")
    return subprocess.call([sys.executable, *words])


def _meant(run: str | None, process: str | None) -> tuple[RunDir, str]:
    """A single word that is no run is a process of the newest run."""
    if run and process is None and not is_run(run):
        return find_run(None), run
    return find_run(run), process or DEFAULT
