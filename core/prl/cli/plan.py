"""`prl plan CONFIG`: memory and time of a config on devices you need not have, and which layouts would be better.

The model is built without data, so a trillion parameters take a laptop and seconds. Rates of devices come from a table
(prl/plan/devices.toml says from where); lengths of rollouts are assumed, a flag each. The layout is that of [trainer],
changed by --layout; beside it the usual ones are looked at, or those of --sweep.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

import attrs

from prl.cli.launch import add_composition_arguments
from prl.cli.table import columns
from prl.errors import UserError

if TYPE_CHECKING:
    from prl.plan.workload import Rollouts


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("plan", help="memory and time on devices you need not have", description=__doc__)
    add_composition_arguments(parser)
    layout = parser.add_argument_group("layout")
    layout.add_argument(
        "--layout", nargs="+", default=[], metavar="AXIS=N", help="replicate, shard, context (cp), expert (ep)"
    )
    layout.add_argument(
        "--sweep", nargs="+", default=[], metavar="AXIS=A,B", help="look at every combination of these degrees"
    )
    layout.add_argument("--checkpointing", choices=("none", "full"), help="of activations, if not the config's")
    layout.add_argument("--offload", action="store_true", help="optimizer state in host memory")
    layout.add_argument(
        "--offload-activations", action="store_true", help="inputs of what is computed again in host memory"
    )
    layout.add_argument("--compute", default="bfloat16", metavar="DTYPE", help="of products (default bfloat16)")
    devices = parser.add_argument_group("devices")
    devices.add_argument("--device", default="h200", metavar="KEY", help="of the table (default h200)")
    devices.add_argument("--engine-devices", type=int, metavar="N", help="devices of one engine, if not the config's")
    add_rollout_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=run)


def add_rollout_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for what is assumed of a step's rollouts; `rollouts_of` reads them."""
    rollouts = parser.add_argument_group("rollouts")
    for name, help_text in (
        ("--length-mean", "tokens of a rollout, on average; default half of rollouts.sequence_length"),
        ("--length-sigma", "their spread: standard deviation of the logarithm (default 0.6)"),
        ("--sampled", "share of the tokens that the policy samples (default 0.5)"),
    ):
        rollouts.add_argument(name, type=float, metavar="X", help=help_text)


def run(arguments: argparse.Namespace) -> int:
    from prl.compose.compose import compose
    from prl.plan.advise import advise
    from prl.plan.config import axes, checkpointing_of, fleet_of, layout_of
    from prl.plan.describe import as_json, sections
    from prl.plan.devices import named
    from prl.plan.study import Options, study

    composition = compose(arguments.config, plugins=arguments.plugins, overrides=arguments.set, probe=False)
    config = composition.run
    checkpointing, recompute = checkpointing_of(config, arguments.checkpointing)
    if arguments.offload_activations and checkpointing == "none":
        raise UserError("--offload-activations: is for activation checkpointing; add --checkpointing full")
    options = Options(
        device=named(arguments.device),
        fleet=fleet_of(config, arguments.engine_devices),
        rollouts=rollouts_of(arguments),
        compute=_dtype(arguments.compute),
        checkpointing=checkpointing,
        recompute=recompute,
        optimizer_offload=arguments.offload or config.trainer.optimizer_offload,
        activation_offload=arguments.offload_activations or config.trainer.activation_offload,
    )
    layout, swept = layout_of(config, arguments.layout), axes(arguments.sweep)
    studied = study(composition, options)
    advice = advise(studied, layout, swept)
    if arguments.json:
        print(json.dumps(as_json(studied, advice), indent=1))
    else:
        print("\n\n".join(f"{title}\n{columns(rows)}" for title, rows in sections(studied, advice)))
    return 0


def rollouts_of(arguments: argparse.Namespace) -> Rollouts:
    """What the flags say."""
    from prl.plan.workload import Rollouts

    given = {field.name: getattr(arguments, field.name) for field in attrs.fields(Rollouts)}
    try:
        return Rollouts(**{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise UserError(f"rollouts: {error.args[0]}") from error


def _dtype(name: str) -> str:
    if name not in ("bfloat16", "float32"):
        raise UserError(f"--compute {name}: expected bfloat16 or float32")
    return name
