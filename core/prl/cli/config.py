"""`prl config check|show|diff`: a config with its layers merged and every default written out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from prl.cli.launch import add_composition_arguments

ABSENT = "(absent)"


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("config", help="check, show and compare configs", description=__doc__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, function, help_text in (
        ("check", check, "report every problem a launch would"),
        ("show", show, "print the resolved TOML"),
    ):
        command = commands.add_parser(name, help=help_text, description=help_text)
        add_composition_arguments(command)
        command.set_defaults(run=function)
    comparison = commands.add_parser("diff", help="what two resolved configs do not share", description=diff.__doc__)
    comparison.add_argument("first", type=Path, metavar="A")
    comparison.add_argument("second", type=Path, metavar="B")
    comparison.set_defaults(run=diff)


def check(arguments: argparse.Namespace) -> int:
    """Compose as `prl launch` would, and say so when nothing is wrong."""
    from prl.compose.compose import compose

    composition = compose(arguments.config, plugins=arguments.plugins, overrides=arguments.set)
    print(f"{arguments.config}: ok, {len(composition.plugins)} plugins")
    return 0


def show(arguments: argparse.Namespace) -> int:
    """Print what a run would be launched with."""
    from prl.compose import toml
    from prl.compose.compose import compose

    composition = compose(arguments.config, plugins=arguments.plugins, overrides=arguments.set, probe=False)
    print(toml.dumps(composition.resolved), end="")
    return 0


def diff(arguments: argparse.Namespace) -> int:
    """One line per dotted path whose value differs between two resolved configs."""
    from prl.compose import toml
    from prl.compose.compose import compose

    first, second = (toml.flatten(compose(path, probe=False).resolved) for path in (arguments.first, arguments.second))
    for path in sorted(first.keys() | second.keys()):
        before, after = (repr(side[path]) if path in side else ABSENT for side in (first, second))
        if before != after:
            print(f"{path}: {before} -> {after}")
    return 0
