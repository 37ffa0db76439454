"""What a config says about layout and memory, and what options of the command line make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from prl.compose.config import Run
from prl.plan.layout import parsed
from prl.plan.memory import Checkpointing
from prl.plan.serving import Fleet
from prl.train.layout import Layout
from prl.train.layout import layout_of as layout_of_section


def layout_of(run: Run, given: Sequence[str]) -> Layout:
    """Of `[trainer]`, with `axis=degree` from the command line; `shard` takes the ranks that are left."""
    degrees: dict[str, Any] = {axis: values[0] for text in given for axis, values in parsed(text).items()}
    layout = layout_of_section(attrs.evolve(run.trainer, **degrees))
    return attrs.evolve(layout, shard=max(1, layout.shard))


def checkpointing_of(run: Run, given: Checkpointing | None) -> tuple[Checkpointing, tuple[str, ...]]:
    """And what is computed again under selective checkpointing, which a command line does not say."""
    chosen = given or run.trainer.activation_checkpointing
    return chosen, run.trainer.recompute if chosen == "selective" else ()


def fleet_of(run: Run, devices: int | None) -> Fleet:
    """The engines, each of so many devices."""
    return Fleet(engines=run.engine.count, devices=devices or int(getattr(run.engine, "gpus", 1)))


def axes(specifications: Sequence[str]) -> Mapping[str, Sequence[int]]:
    """Of `--sweep`."""
    return {axis: values for text in specifications for axis, values in parsed(text).items()}
