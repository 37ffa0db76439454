"""`prl audit [RUN]`: prove from a run's files that each prompt was trained once, nothing too old, nothing missing."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from prl.cli.runs import add_run_argument, find_run
from prl.cli.table import columns

if TYPE_CHECKING:
    from prl.ledger.report import Audit, Check, Share

_SHOWN = 10
"""Problems of a check that are printed; --json has all."""


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("audit", help="prove what a run trained on", description=__doc__)
    add_run_argument(parser)
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import attrs

    from prl.ledger.audit import audit

    found = audit(find_run(arguments.directory))
    if arguments.json:
        checks = [{**attrs.asdict(check), "passed": check.passed} for check in found.checks]
        print(json.dumps({**attrs.asdict(found), "checks": checks, "passed": found.passed}, indent=1))
    else:
        print(page(found))
    return 0 if found.passed else 1


def page(audit: Audit) -> str:
    """The audit as text."""
    parts = [
        "\n".join([audit.run, *(f"  {launch}" for launch in audit.launches)]),
        "\n".join(line for check in audit.checks for line in _check(check)),
    ]
    if audit.bias:
        parts.append(f"what was trained, and what was left out\n{columns([_HEAD, *map(_share, audit.bias)])}")
    parts.append("\n".join(["not proven", *(f"  - {sentence}" for sentence in audit.unproven)]))
    failed = sum(not check.passed for check in audit.checks)
    parts.append(f"FAIL: {failed} of {len(audit.checks)} checks" if failed else f"PASS: {len(audit.checks)} checks")
    return "\n\n".join(parts)


def _check(check: Check) -> list[str]:
    mark = "PASS" if check.passed else "FAIL"
    lines = [f"{mark}  {check.name}: {check.claim}", f"      {check.numbers}"]
    lines += [f"      ! {problem}" for problem in check.problems[:_SHOWN]]
    more = len(check.problems) - _SHOWN
    return [*lines, f"      ! and {more:,} more (--json)"] if more > 0 else lines


_HEAD = ["END", "SOURCE", "ATTEMPTS", "ROLLOUTS", "LENGTH", "REWARD", "SECONDS"]


def _share(share: Share) -> list[str]:
    means = (share.length, share.reward, share.seconds)
    shown = ["?" if mean is None else f"{mean:.4g}" for mean in means]
    return [share.end, share.environment, f"{share.attempts:,}", f"{share.rollouts:,}", *shown]
