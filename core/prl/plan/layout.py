"""Layouts of a trainer (`prl.train.layout`) beside the configured one, and why some cannot work."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from prl.errors import UserError
from prl.train.layout import Layout

AXES = ("replicate", "shard", "context", "expert")
_SHORT = {"cp": "context", "ep": "expert", "dp": "shard"}


def sharded_over(layout: Layout) -> int:
    """Ranks that hold one copy of what is not an expert."""
    return layout.shard * layout.context


def experts_over(layout: Layout) -> int:
    """Ranks that hold one copy of one share of the experts."""
    return sharded_over(layout) // layout.expert


def shown(layout: Layout) -> str:
    """The degrees that divide something.

    Example:
        >>> shown(Layout(shard=16, context=8))
        'shard=16 context=8'
    """
    return " ".join(f"{axis}={getattr(layout, axis)}" for axis in AXES if axis == "shard" or getattr(layout, axis) > 1)


def impossible(layout: Layout, *, ranks: int, experts: int) -> list[str]:
    """Every reason why these ranks cannot share a model with so many experts (0: dense) this way."""
    reasons = []
    if layout.ranks != ranks:
        product = " x ".join(str(getattr(layout, axis)) for axis in AXES[:3])
        reasons.append(f"replicate x shard x context = {product} = {layout.ranks}, and there are {ranks} ranks")
    if sharded_over(layout) % layout.expert:
        reasons.append(f"expert={layout.expert} does not divide shard x context = {sharded_over(layout)}")
    if layout.expert > 1 and not experts:
        reasons.append(f"expert={layout.expert}, and the model has no experts")
    elif experts % layout.expert:
        reasons.append(f"expert={layout.expert} does not divide the model's {experts} experts")
    return reasons


def parsed(text: str) -> dict[str, tuple[int, ...]]:
    """`expert=8,16` -> {"expert": (8, 16)}; UserError says what was expected."""
    name, _, values = text.partition("=")
    axis = _SHORT.get(name.strip(), name.strip())
    try:
        numbers = tuple(int(value) for value in values.split(","))
    except ValueError:
        numbers = ()
    if axis not in AXES or not numbers or min(numbers) < 1:
        raise UserError(f"{text}: expected one of {', '.join(AXES)} (cp, ep) and numbers, as in expert=8,16")
    return {axis: numbers}


def combinations(base: Layout, ranks: int, axes: Mapping[str, Sequence[int]]) -> list[Layout]:
    """Every combination of the given degrees; what is not given is the base's, and `shard` takes the ranks left."""
    layouts = []
    for values in itertools.product(*axes.values()):
        degrees: dict[str, Any] = dict(zip(axes, values, strict=True))
        layout = attrs.evolve(base, **degrees)
        if "shard" not in axes:
            layout = attrs.evolve(layout, shard=max(1, ranks // (layout.replicate * layout.context)))
        layouts.append(layout)
    return layouts


def neighbours(experts: int) -> dict[str, tuple[int, ...]]:
    """The degrees that are worth a look when nobody names any."""
    degrees = tuple(degree for degree in (1, 8, 16, 32, 64) if degree == 1 or (experts and experts % degree == 0))
    return {"context": (1, 2, 4, 8, 16), "expert": degrees}
