"""What a config says about layout and memory; command-line options fill in or change the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prl.compose.config import Run
from prl.plan.layout import Layout, parsed
from prl.plan.memory import Checkpointing
from prl.plan.serving import Fleet


def layout_of(run: Run, given: Sequence[str]) -> Layout:
    """Of `[trainer]`, with `axis=degree` from the command line; `shard` takes the ranks that are left."""
    degrees: dict[str, int] = {
        axis: getattr(run.trainer, axis, 0) for axis in ("replicate", "shard", "context", "expert")
    }
    degrees |= {axis: values[0] for text in given for axis, values in parsed(text).items()}
    others = max(1, degrees["replicate"]) * max(1, degrees["context"])
    shard = degrees["shard"] or max(1, run.trainer.ranks // others)
    return Layout(**{axis: max(1, degree) for axis, degree in degrees.items()} | {"shard": shard})


def checkpointing_of(run: Run, given: str | None) -> Checkpointing:
    """Selective checkpointing keeps less than none does: it is planned as none."""
    chosen = given or getattr(run.trainer, "activation_checkpointing", "none")
    return "full" if chosen == "full" else "none"


def offload_of(run: Run, given: bool) -> bool:
    return given or bool(getattr(run.trainer, "optimizer_offload", False))


def fleet_of(run: Run, devices: int | None) -> Fleet:
    """The engines, each of so many devices."""
    return Fleet(engines=run.engine.count, devices=devices or int(getattr(run.engine, "gpus", 1)))


def axes(specifications: Sequence[str]) -> Mapping[str, Sequence[int]]:
    """Of `--sweep`."""
    return {axis: values for text in specifications for axis, values in parsed(text).items()}
