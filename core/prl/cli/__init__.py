"""The command line, `prl COMMAND`: runs one command and turns a foreseen error into its sentence and exit code.

Each command is a module of this package with `register(subparsers)`, which adds its parser and sets its function as the
parser's default `run`; that takes the parsed arguments and returns an exit code: 0 done, 1 the run failed, 2 what the
user wrote is wrong, 3 a lock mismatch. A command's module imports nothing heavy: what it needs comes when it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from prl import __version__
from prl.cli import (
    attach,
    audit,
    bench,
    config,
    explain,
    launch,
    logs,
    plan,
    plugins,
    replay,
    report,
    resume,
    serve,
    simulate,
    status,
    stop,
    weights,
    worker,
)
from prl.errors import PrlError

COMMANDS = (
    *(launch, status, logs, attach, stop, resume, report, audit, explain, replay, simulate),
    *(serve, plan, bench, config, plugins, weights, worker),
)
"""In the order in which `prl --help` shows them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code of the process."""
    parsed = parser().parse_args(arguments)
    try:
        code: int = parsed.run(parsed)
        return code
    except PrlError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough; nothing may be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="prl", description="Asynchronous reinforcement learning for language models, assembled from plugins."
    )
    parser.add_argument("--version", action="version", version=f"prl {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.register(subparsers)
    return parser
