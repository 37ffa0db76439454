"""What a config says about layout and memory, and what options of the command line make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prl.compose.config import Run
from prl.plan.layout import AXES, parsed
from prl.plan.memory import Checkpointing
from prl.plan.serving import Fleet
from prl.train.layout import Layout


def layout_of(run: Run, given: Sequence[str]) -> Layout:
    """Of `[trainer]`, with `axis=degree` from the command line; `shard` takes the ranks that are left."""
    degrees: dict[str, Any] = {axis: getattr(run.trainer, axis) for axis in AXES}
    degrees |= {axis: values[0] for text in given for axis, values in parsed(text).items()}
    left = max(1, run.trainer.ranks // (degrees["replicate"] * degrees["context"]))
    degrees["shard"] = degrees["shard"] or left
    return Layout(**degrees, divides_heads=run.trainer.context_attention != "gather")


def checkpointing_of(run: Run, given: str | None) -> Checkpointing:
    """What selective checkpointing keeps depends on what it selects; it is planned as none, which keeps more."""
    return "full" if (given or run.trainer.activation_checkpointing) == "full" else "none"


def fleet_of(run: Run, devices: int | None) -> Fleet:
    """The engines, each of so many devices."""
    return Fleet(engines=run.engine.count, devices=devices or int(getattr(run.engine, "gpus", 1)))


def axes(specifications: Sequence[str]) -> Mapping[str, Sequence[int]]:
    """Of `--sweep`."""
    return {axis: values for text in specifications for axis, values in parsed(text).items()}
