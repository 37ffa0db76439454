"""`prl worker`: become one process of a run. Launchers call this; people need not."""

from __future__ import annotations

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("worker", help="one process of a run (started by launchers)", description=__doc__)
    parser.add_argument("--run", dest="directory", required=True, metavar="DIR", help="run directory")
    parser.add_argument("--role", required=True, help="what to become: controller, engine, environment, trainer, ...")
    parser.add_argument("--index", type=int, default=0, help="which one of its role")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from prl.errors import UserError
    from prl.run_dir import RunDir
    from prl.worker import ROLES, main

    if arguments.role not in ROLES:
        raise UserError(f"--role {arguments.role}: expected one of {', '.join(ROLES)}")
    return main(RunDir.existing(arguments.directory), arguments.role, arguments.index)
