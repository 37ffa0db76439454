"""`prl replay [RUN]`: do a run again from its event log, and compare every batch and all weights with its ledger.

Controller and trainer re-execute what is on record; no engine and no environment takes part. Exit code 0: everything is
equal, bit for bit; 1: something differs, and the first thing that does is printed, or the log ends too early.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prl.cli.resume import refuse_living
from prl.cli.runs import add_run_argument, find_run
from prl.run_dir import RunDir

if TYPE_CHECKING:
    from prl.replay.launch import Replayed


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("replay", help="do a run again from its event log, and compare", description=__doc__)
    add_run_argument(parser)
    parser.add_argument("--until", type=int, metavar="N", help="last step to replay; by default the last that was done")
    parser.add_argument("--json", action="store_true", help="what came of it, for programs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import attrs

    from prl.replay.launch import replay

    run_dir = find_run(arguments.directory)
    refuse_living(RunDir(run_dir.replay), patience=0.0)
    done = list(replay(run_dir, until=arguments.until, tell=not arguments.json))
    equal = all(replayed.complete for replayed in done)
    if arguments.json:
        launches = [{"launch": replayed.segment.launch, **attrs.asdict(replayed.report)} for replayed in done]
        print(json.dumps({"run": str(run_dir.path), "equal": equal, "launches": launches}, indent=1))
    else:
        print("\n".join(page(done)))
    return 0 if equal else 1


def page(done: Sequence[Replayed]) -> Iterator[str]:
    """What came of it, as text."""
    for replayed in done:
        segment, report = replayed.segment, replayed.report
        steps = f"steps {segment.start + 1} to {report.trained}" if report.trained > segment.start else "no step"
        published = f"{report.weights} of them published"
        yield f"launch {segment.launch}: {steps} replayed; batches and weights ({published}) are equal, bit for bit"
    last = done[-1].report
    if last.difference is not None:
        different = last.difference
        yield f"step {different.step} differs: {different.what}"
        yield from (f"  {name:<9} {value}" for name, value in _values(different.recorded, different.replayed))
        yield from [f"  {different.detail}"] if different.detail else []
    elif last.error:
        yield last.error
    elif not done[-1].complete:
        yield f"stopped before step {done[-1].segment.end}"


def _values(recorded: str, replayed: str) -> list[tuple[str, str]]:
    return [("recorded", recorded), ("replayed", replayed)]
