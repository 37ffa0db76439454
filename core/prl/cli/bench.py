"""`prl bench train CONFIG`: the config's trainer alone, at full speed, on made-up rollouts of a given length.

Starts the real ranks (any model and layout of [trainer]), trains a step to warm up and then --steps steps, and prints
tokens per second, MFU, memory and the time of each phase. --trace also writes what every rank does in one more step,
for https://ui.perfetto.dev. Nothing is sampled and no engine is started. --calibrate measures, with lengths of its own,
what operations of attention cost beside products, and writes it as [trainer.costs], for `extends` of the config.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from prl.cli.launch import add_composition_arguments
from prl.cli.plan import add_rollout_arguments, rollouts_of
from prl.cli.table import columns
from prl.errors import UserError

if TYPE_CHECKING:
    from prl.compose.compose import Composition


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("bench", help="measure a part of a run alone", description="Measure one part.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    train = commands.add_parser("train", help="the trainer, on made-up rollouts", description=__doc__)
    add_composition_arguments(train)
    train.add_argument("--steps", type=int, default=3, metavar="N", help="timed optimizer steps (default 3)")
    train.add_argument("--trace", type=Path, metavar="DIR", help="write rank-<r>.json, a trace of one step, there")
    train.add_argument("--calibrate", type=Path, metavar="FILE", help="write [trainer.costs], as measured, there")
    train.add_argument("--json", action="store_true", help="print the metrics of every timed step as JSON")
    add_rollout_arguments(train)
    train.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from prl.compose.compose import compose
    from prl.plan import trial

    if arguments.steps < 1:
        raise UserError(f"--steps must be at least 1, got {arguments.steps}")
    with tempfile.TemporaryDirectory(prefix="prl-bench-") as folder:
        overrides = [*arguments.set, f"run.dir={json.dumps(folder)}"]
        composition = compose(arguments.config, plugins=arguments.plugins, overrides=overrides, probe=False)
        rollouts = rollouts_of(arguments)
        if arguments.calibrate:
            return _calibrate(arguments.calibrate, composition, arguments.config, rollouts.sampled)
        lengths = rollouts.lengths(composition.run)
        found = trial.run(
            trial.Trial(
                composition=composition,
                source=arguments.config,
                steps=[lengths] * arguments.steps,
                sampled=rollouts.sampled,
                trace=str(arguments.trace.resolve()) if arguments.trace else "",
            )
        )
    if arguments.json:
        print(json.dumps({"lengths": lengths, "steps": found}, indent=1))
    else:
        print(columns(_rows(found, lengths, composition.run.trainer.ranks)))
    return 0


def _calibrate(file: Path, composition: Composition, source: Path, sampled: float) -> int:
    from prl.plan import calibrate, trial

    steps = calibrate.steps(composition.run)
    found = trial.run(trial.Trial(composition=composition, source=source, steps=steps, sampled=sampled))
    seconds = [step["time/forward_backward"] + step["time/optimizer"] for step in found]
    costs = calibrate.measured(composition, sampled, seconds)
    lengths = sorted({step[0] for step in steps})
    lines = [
        f"# prl bench train {source.name} --calibrate: documents of {lengths[0]} to {lengths[-1]} tokens",
        "[trainer.costs]",
        *(f"{name} = {value}" for name, value in attrs.asdict(costs).items()),
    ]
    file.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


def _rows(found: Sequence[dict[str, float]], lengths: Sequence[int], ranks: int) -> list[list[str]]:
    mean = {name: statistics.fmean(step[name] for step in found) for name in found[0]}
    per_device = mean["tokens/per_second_per_device"]
    rows = [
        ["tokens per second per device", f"{per_device:,.0f}", f"{ranks} ranks: {per_device * ranks:,.0f}"],
        ["rollouts", f"{len(lengths):,}", f"{sum(lengths):,} tokens a step, the longest {max(lengths):,}"],
    ]
    if "flops/per_second_per_device" in mean:
        share = f"MFU {mean['mfu']:.1%}" if "mfu" in mean else "no MFU: the device is not in the table"
        rows.append(["TFLOP/s per device", f"{mean['flops/per_second_per_device'] / 1e12:,.2f}", share])
    rows.append(["memory of the largest rank", f"{mean['memory/peak'] / 1e9:,.2f} GB", "at most"])
    rows += [
        [name, f"{1e3 * value:,.0f} ms", "of the slowest rank"]
        for name, value in mean.items()
        if name.startswith("time/") and value and name != "time/export"
    ]
    return rows
