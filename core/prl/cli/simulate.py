"""`prl simulate CONFIG`: what a run would come to, by its own scheduler on a virtual clock, and what changes would buy.

Without --from, everything but the config is assumed: set the flags to what you know. With it, lengths, failures and
times are fitted to a past run, and the simulation of that run is shown beside its record.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prl.cli.launch import add_composition_arguments
from prl.cli.table import columns
from prl.errors import UserError
from prl.simulate.assumptions import FLAGS, Assumptions

if TYPE_CHECKING:
    from prl.compose.compose import Composition
    from prl.simulate.figures import Figures
    from prl.simulate.fit import Recorded

_FITTING_STEPS = 50


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("simulate", help="what a run would come to, on a virtual clock", description=__doc__)
    add_composition_arguments(parser)
    parser.add_argument("--from", dest="past", metavar="RUN", help="fit the assumptions to this run's record")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="optimizer steps to simulate (default 100)")
    parser.add_argument(
        "--sweep",
        nargs="+",
        default=[],
        metavar="SECTION.KEY=A,B",
        help="simulate every combination of these values; by default one step around the bound and the group size",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    group = parser.add_argument_group("assumptions")
    for field in FLAGS:
        default = f" (default {field.default})" if field.default else ""
        help_text = f"{field.metadata['help']}{default}"
        group.add_argument(_flag(field.name), type=type(field.default), metavar="N", help=help_text)
    parser.set_defaults(run=run)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def run(arguments: argparse.Namespace) -> int:
    from prl.compose.compose import compose
    from prl.simulate.compare import compare
    from prl.simulate.describe import Study, as_json, sections

    def composed(overrides: Sequence[str]) -> Composition:
        merged = [*arguments.set, *overrides]
        return compose(arguments.config, plugins=arguments.plugins, overrides=merged, probe=False)

    if arguments.steps < 1:
        raise UserError(f"--steps must be at least 1, got {arguments.steps}")
    assumptions, past = _assumptions(arguments)
    assumptions = assumptions.completed(composed(()))
    outcomes = compare(composed, assumptions, sweep=arguments.sweep, steps=arguments.steps)
    study = Study(assumptions=assumptions, outcomes=outcomes, past=past)
    if arguments.json:
        print(json.dumps(as_json(study), indent=1))
    else:
        print("\n\n".join(f"{title}\n{columns(rows)}" for title, rows in sections(study)))
    return 0


def _assumptions(arguments: argparse.Namespace) -> tuple[Assumptions, tuple[Recorded, Figures] | None]:
    """What is assumed; with --from also the record of the past run, and its simulation."""
    import attrs

    given = {field.name: getattr(arguments, field.name) for field in FLAGS}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        assumptions = Assumptions(**given)
    except ValueError as error:
        raise UserError(f"assumptions: {error.args[0]}") from error
    if arguments.past is None:
        return assumptions, None
    fitted, recorded, figures = _fitted(arguments.past, assumptions)
    return attrs.evolve(fitted, **given), (recorded, figures)


def _fitted(directory: str, assumptions: Assumptions) -> tuple[Assumptions, Recorded, Figures]:
    from prl.compose.compose import compose
    from prl.run_dir import RunDir
    from prl.simulate import fit
    from prl.simulate.run import simulate

    run_dir = RunDir.existing(directory)
    past = compose(run_dir.config, probe=False)
    recorded = fit.read(run_dir)
    steps = min(recorded.steps, _FITTING_STEPS)
    fitted, figures = fit.fit(
        recorded,
        assumptions,
        group_size=past.run.rollouts.group_size,
        simulate=lambda candidate: simulate(past, candidate, steps=steps),
    )
    return fitted, recorded, figures
