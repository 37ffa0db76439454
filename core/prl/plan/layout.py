"""How the ranks of a trainer share a model, and why some ways cannot work."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import attrs

from prl.errors import UserError

AXES = ("replicate", "shard", "context", "expert")
_SHORT = {"cp": "context", "ep": "expert", "dp": "shard"}


@attrs.frozen(kw_only=True)
class Layout:
    """Degrees of parallelism. Ranks are numbered with `context` innermost, then `shard`, then `replicate`."""

    replicate: int = 1
    """Copies of the whole model; gradients are summed over them."""
    shard: int = 1
    """Data ranks over which parameters, gradients and optimizer state are divided."""
    context: int = 1
    """Ranks that share the tokens of one micro-batch."""
    expert: int = 1
    """Ranks that share the experts; borrowed from `shard` and `context`."""

    @property
    def ranks(self) -> int:
        return self.replicate * self.shard * self.context

    @property
    def data_ranks(self) -> int:
        return self.replicate * self.shard

    @property
    def sharded_over(self) -> int:
        """Ranks that hold one copy of what is not an expert."""
        return self.shard * self.context

    @property
    def experts_over(self) -> int:
        """Ranks that hold one copy of one share of the experts."""
        return self.sharded_over // self.expert

    def __str__(self) -> str:
        return " ".join(f"{axis}={getattr(self, axis)}" for axis in AXES if axis == "shard" or getattr(self, axis) > 1)


def impossible(layout: Layout, *, ranks: int, experts: int) -> list[str]:
    """Every reason why these ranks cannot share a model with so many experts (0: dense) this way."""
    reasons = []
    if layout.ranks != ranks:
        product = " x ".join(str(getattr(layout, axis)) for axis in AXES[:3])
        reasons.append(f"replicate x shard x context = {product} = {layout.ranks}, and there are {ranks} ranks")
    if layout.sharded_over % layout.expert:
        reasons.append(f"expert={layout.expert} does not divide shard x context = {layout.sharded_over}")
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
        layout = attrs.evolve(base, **dict(zip(axes, values, strict=True)))
        if "shard" not in axes:
            layout = attrs.evolve(layout, shard=max(1, ranks // (layout.replicate * layout.context)))
        layouts.append(layout)
    return layouts


def neighbours(experts: int) -> dict[str, tuple[int, ...]]:
    """The degrees that are worth a look when nobody names any."""
    degrees = tuple(degree for degree in (1, 8, 16, 32, 64) if degree == 1 or (experts and experts % degree == 0))
    return {"context": (1, 2, 4, 8, 16), "expert": degrees}
