"""`prl launch CONFIG`: compose a run, make its directory, hand its processes to the launcher and wait."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prl.cli.runs import find_run
from prl.cli.table import columns
from prl.run_dir import RunDir
from prl.supervise.claim import claimed

INTERRUPTED = 130
"""What a launcher returns when the user would not wait for the run's end."""

if TYPE_CHECKING:
    from prl.compose.chain import Chain
    from prl.compose.compose import Composition
    from prl.compose.plan import LaunchPlan
    from prl.providers import ProcessLauncher


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
        "--after", default="", metavar="RUN", help="start when that run has finished; --from may name the same one"
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
    from prl.cli.start import start
    from prl.compose.compose import planned_run_dir
    from prl.compose.plan import plan

    composition = _composed(arguments)
    if arguments.sweep:
        return _sweep(arguments, planned_run_dir(composition, arguments.config).path)
    if arguments.dry_run:
        print(_dry_run(composition, arguments))
        return 0
    intended = planned_run_dir(composition, arguments.config)
    launcher = composition.build(composition.run.launcher, intended.path)
    launcher.check(plan(composition, intended))
    run_dir = _make(arguments, composition, intended)
    with claimed(run_dir):
        return start(launcher, plan(composition, run_dir))


def _make(arguments: argparse.Namespace, composition: Composition, where: RunDir | None = None) -> RunDir:
    """The run directory, and in it which run it follows."""
    from prl.compose import chain
    from prl.compose.compose import create_run

    run_dir = create_run(composition, arguments.config, where)
    if (chained := _chain(arguments)) is not None:
        chain.write(run_dir, chained)
    print(f"run directory: {run_dir.path}", flush=True)
    return run_dir


def _composed(arguments: argparse.Namespace, *more: str) -> Composition:
    from prl.compose.chain import checkpoint_of
    from prl.compose.compose import compose
    from prl.compose.origin import check_launch

    chained = _chain(arguments)
    begin = []
    if arguments.origin and not (chained and chained.start):
        run_dir, step = run_and_step(arguments.origin)
        begin = [f"checkpoints.resume={json.dumps(str(checkpoint_of(run_dir, step)))}"]
    composition = compose(arguments.config, plugins=arguments.plugins, overrides=[*arguments.set, *begin, *more])
    check_launch(composition)
    return composition


def _sweep(arguments: argparse.Namespace, folder: Path) -> int:
    """Every run is composed and checked before the first is made; then all at once, or one after the other."""
    from prl.cli.start import ready
    from prl.compose.compose import planned_run_dir
    from prl.compose.plan import plan
    from prl.compose.sweep import members

    composed = []
    for member in members(arguments.sweep):
        where = f"run.dir={json.dumps(str(folder / member.name))}"
        composed.append(_composed(arguments, *member.overrides, where))
    planned = [plan(each, planned_run_dir(each, arguments.config)) for each in composed]
    if arguments.dry_run:
        print(f"{len(planned)} runs (not made)\n" + "\n".join(f"  {each.run_dir.path}" for each in planned))
        print(f"\nthe first of them\n{_dry_run(composed[0], arguments)}")
        return 0
    launchers = [each.build(each.run.launcher, to.run_dir.path) for each, to in zip(composed, planned, strict=True)]
    alike = all(each.run.launcher == composed[0].run.launcher for each in composed)
    for launcher, each in list(zip(launchers, planned, strict=True))[: 1 if alike else None]:
        launcher.check(each)
    for made in composed:
        _make(arguments, made)
    if not (alike and hasattr(launchers[0], "launch_all")):
        return _one_after_the_other(launchers, planned)
    given = [ready(launcher, each) for launcher, each in zip(launchers, planned, strict=True)]
    if None in given:
        return INTERRUPTED
    code: int = launchers[0].launch_all(given, folder)
    return code


def _one_after_the_other(launchers: Sequence[ProcessLauncher], planned: Sequence[LaunchPlan]) -> int:
    """One that fails does not keep the next from starting; the user's interruption does."""
    from prl.cli.start import start

    worst = 0
    for launcher, each in zip(launchers, planned, strict=True):
        with claimed(each.run_dir):
            code = start(launcher, each)
        if code == INTERRUPTED:
            return code
        worst = max(worst, code)
    return worst


def run_and_step(origin: str) -> tuple[RunDir, int | None]:
    """The run that RUN[@STEP] names, and the step where it does."""
    name, at, step = origin.rpartition("@")
    return (find_run(name), int(step)) if at and step.isdigit() else (find_run(origin), None)


def _chain(arguments: argparse.Namespace) -> Chain | None:
    """What --after asks for; a checkpoint of the run to follow is looked for when that has finished."""
    from prl.compose.chain import Chain

    if not arguments.after:
        return None
    after = find_run(arguments.after)
    run_dir, step = run_and_step(arguments.origin) if arguments.origin else (None, None)
    if run_dir != after:
        return Chain(after=str(after.path))
    return Chain(after=str(after.path), start=str(after.path), step=step)


def _dry_run(composition: Composition, arguments: argparse.Namespace) -> str:
    from prl.cli.start import following
    from prl.compose import describe
    from prl.compose.compose import planned_run_dir
    from prl.compose.plan import plan

    run_dir, chained = planned_run_dir(composition, arguments.config), _chain(arguments)
    launcher = composition.build(composition.run.launcher, run_dir.path)
    planned = following(launcher, plan(composition, run_dir), RunDir(chained.after) if chained else None)
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
