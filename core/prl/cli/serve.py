"""`prl serve RUN[@STEP]`: talk to a version that stays, while the run goes on or after it.

An engine of its own serves the checkpoint of that step, the newest by default, to OpenAI's clients, until it is
interrupted. It is the kind of engine that the run has; --set changes it, as in `prl launch`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from prl.cli.launch import add_edit_arguments, run_and_step


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("serve", help="serve a checkpoint to OpenAI's clients", description=__doc__)
    parser.add_argument("checkpoint", metavar="RUN[@STEP]", help="run directory, or its name in runs/, and a step")
    add_edit_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from prl.serve.checkpoint import serve

    run_dir, step = run_and_step(arguments.checkpoint)

    def tell(model: str, url: str, key: Path) -> None:
        print(f"{model} at {url}/v1\nkey in {key}", flush=True)

    serve(run_dir, step=step, plugins=arguments.plugins, overrides=arguments.set, tell=tell)
    return 0
