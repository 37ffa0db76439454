"""`prl report [RUN]`: one self-contained HTML page with a run's curves and sample rollouts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import attrs

from prl.cli.runs import FINAL, add_run_argument, find_run, is_over
from prl.errors import UserError


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("report", help="write a page with a run's curves and rollouts", description=__doc__)
    add_run_argument(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write it; by default RUN/report.html")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from prl.report.load import load
    from prl.report.page import render

    run_dir = find_run(arguments.directory)
    output: Path = arguments.output or run_dir.path / "report.html"
    record = load(run_dir)
    if is_over(run_dir) and record.status not in FINAL:
        record = attrs.evolve(record, status="killed")
    page = render(record)
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the report to {output}: {error.strerror}") from error
    print(output)
    return 0
