"""`prl launch CONFIG`: compose a run, make its directory, hand its processes to the launcher and wait."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prl import checkpoint_dir
from prl.checkpoint_dir import step_of
from prl.cli.runs import find_run
from prl.cli.table import columns
from prl.errors import UserError

if TYPE_CHECKING:
    from prl.compose.compose import Composition
    from prl.compose.plan import LaunchPlan
    from prl.providers import ProcessLauncher

INTERRUPTED = 130
"""What a launcher returns when the user would not wait for the run's end."""


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("launch", help="start a run and wait for it", description=__doc__)
    add_composition_arguments(parser)
    parser.add_argument(
        "--from",
        dest="origin",
        default="",
        metavar="RUN[@STEP]",
        help="start from a checkpoint of another run, by default its newest; steps go on counting from there",
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE,VALUE",
        help="one run per value, and per combination where given again, each in a folder of its own",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the composition and the processes; start and write nothing"
    )
    parser.set_defaults(run=run)


def add_composition_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and the two ways to edit it from the command line."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="TOML file")
    add_edit_arguments(parser)


def add_edit_arguments(parser: argparse.ArgumentParser) -> None:
    """`--plugins` and `--set`."""
    parser.add_argument("--plugins", default="", metavar="X,no:Y", help="add plugin X to the config's list, remove Y")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change a value, written as in TOML (quotes may be left out); lists by index: environments.0.weight=2",
    )


def run(arguments: argparse.Namespace) -> int:
    from prl.compose.compose import create_run, planned_run_dir
    from prl.compose.plan import plan

    composition = _composed(arguments)
    if arguments.sweep:
        return _sweep(arguments, planned_run_dir(composition, arguments.config).path)
    if arguments.dry_run:
        print(_dry_run(composition, arguments.config))
        return 0
    intended = planned_run_dir(composition, arguments.config)
    launcher = composition.build(composition.run.launcher, intended.path)
    launcher.check(plan(composition, intended))
    run_dir = create_run(composition, arguments.config, intended)
    print(f"run directory: {run_dir.path}", flush=True)
    code: int = launcher.launch(plan(composition, run_dir))
    return code


def _composed(arguments: argparse.Namespace, *more: str) -> Composition:
    from prl.compose.compose import compose
    from prl.compose.origin import check_launch

    start = [f"checkpoints.resume={json.dumps(str(_checkpoint(arguments.origin)))}"] if arguments.origin else []
    composition = compose(arguments.config, plugins=arguments.plugins, overrides=[*arguments.set, *start, *more])
    check_launch(composition)
    return composition


def _sweep(arguments: argparse.Namespace, folder: Path) -> int:
    """Every run is composed and checked before the first is made; then all at once, or one after the other."""
    from prl.compose.compose import create_run, planned_run_dir
    from prl.compose.plan import plan
    from prl.compose.sweep import members

    composed = []
    for member in members(arguments.sweep):
        where = f"run.dir={json.dumps(str(folder / member.name))}"
        composed.append(_composed(arguments, *member.overrides, where))
    planned = [plan(each, planned_run_dir(each, arguments.config)) for each in composed]
    if arguments.dry_run:
        print(f"{len(planned)} runs (not made)\n" + "\n".join(f"  {each.run_dir.path}" for each in planned))
        print(f"\nthe first of them\n{_dry_run(composed[0], arguments.config)}")
        return 0
    launchers = [each.build(each.run.launcher, to.run_dir.path) for each, to in zip(composed, planned, strict=True)]
    alike = all(each.run.launcher == composed[0].run.launcher for each in composed)
    for launcher, each in list(zip(launchers, planned, strict=True))[: 1 if alike else None]:
        launcher.check(each)
    for made in composed:
        print(f"run directory: {create_run(made, arguments.config).path}", flush=True)
    if alike and hasattr(launchers[0], "launch_all"):
        code: int = launchers[0].launch_all(planned, folder)
        return code
    return _one_after_the_other(launchers, planned)


def _one_after_the_other(launchers: Sequence[ProcessLauncher], planned: Sequence[LaunchPlan]) -> int:
    """One that fails does not keep the next from starting; the user's interruption does."""
    worst = 0
    for launcher, each in zip(launchers, planned, strict=True):
        code = launcher.launch(each)
        if code == INTERRUPTED:
            return code
        worst = max(worst, code)
    return worst


def _checkpoint(origin: str) -> Path:
    """The checkpoint that RUN[@STEP] names."""
    name, at, step = origin.rpartition("@")
    if not (at and step.isdigit()):
        name, step = origin, ""
    run_dir = find_run(name)
    complete = {step_of(path): path for path in checkpoint_dir.complete(run_dir.checkpoints)}
    if not complete:
        raise UserError(f"--from {origin}: {run_dir.path} has no complete checkpoint")
    chosen = int(step) if step else max(complete)
    if chosen not in complete:
        raise UserError(f"--from {origin}: {run_dir.path} has checkpoints of steps {', '.join(map(str, complete))}")
    return complete[chosen]


def _dry_run(composition: Composition, source: Path) -> str:
    from prl.compose import describe
    from prl.compose.compose import planned_run_dir
    from prl.compose.plan import plan

    run_dir = planned_run_dir(composition, source)
    launcher = composition.build(composition.run.launcher, run_dir.path)
    planned = plan(composition, run_dir)
    return (
        f"composition\n{columns(_rows(composition))}\n\n"
        f"run directory (not made)\n  {run_dir.path}\n\n"
        f"nodes\n{columns(describe.groups(planned))}\n\n"
        f"processes\n{columns(describe.processes(planned))}\n\n"
        f"to be started by {composition.provider(composition.run.launcher).name!r}\n{launcher.render(planned)}"
    )


def _rows(composition: Composition) -> list[list[str]]:
    """Section, provider, plugin and distribution of everything a plugin provides."""
    plugins = {plugin.name: plugin for plugin in composition.plugins}
    rows = [["SECTION", "TYPE", "PLUGIN", "DISTRIBUTION"]]
    for path, section in composition.sections():
        entry = composition.registry.of_config(type(section))
        plugin = plugins[entry.plugin]
        rows.append([path, entry.provider.name, plugin.name, f"{plugin.dist} {plugin.version}"])
    return rows
