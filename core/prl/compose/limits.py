"""What the shape of a model allows: degrees of parallelism that divide what is spread, all told at once.

Model plugins state limits as data (`prl.providers.Limit`); whoever divides a model over ranks asks here.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence

from prl.compose.config import Run
from prl.compose.registry import Registry
from prl.errors import Problem, UserError
from prl.providers import Degree, Limit, Model

DEGREES: tuple[Degree, ...] = ("expert", "tensor", "context")
"""Those that are numbers of `[trainer]`."""


def of_model(run: Run, registry: Registry) -> tuple[Sequence[Limit], list[Problem]]:
    """What the run's model states, none where it states nothing; and why its section cannot be read."""
    provider = registry.of_config(type(run.model)).provider
    if not isinstance(provider, Model) or provider.limits is None:
        return [], []
    module, _, attribute = provider.limits.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)(run.model, 0), []
    except UserError as error:
        return [], [Problem("model", str(error))]


def of_trainer(run: Run, limits: Sequence[Limit]) -> list[Problem]:
    """Problems of the degrees in `[trainer]`."""
    degrees = {name: (f"trainer.{name}", getattr(run.trainer, name, 1)) for name in DEGREES}
    if run.trainer.context_attention == "ulysses":
        degrees["heads"] = ("trainer.context", run.trainer.context)
    return problems(limits, degrees)


def problems(limits: Sequence[Limit], degrees: Mapping[Degree, tuple[str, int]]) -> list[Problem]:
    """One per degree (its dotted path and value) that cannot be, with every limit in its way and what can be.

    Example:
        >>> problems([Limit(degree="tensor", of="groups", count=8)], {"tensor": ("trainer.tensor", 16)})
        [Problem(path='trainer.tensor', message='16 does not divide 8 groups; possible: 1, 2, 4, 8')]
    """
    return [
        Problem(path, _sentence(violated, value, possible(limits, degree)))
        for degree, (path, value) in degrees.items()
        if (violated := [limit for limit in limits if limit.degree == degree and limit.count % value])
    ]


def possible(limits: Sequence[Limit], degree: Degree) -> list[int]:
    """The degrees that divide all that is spread by it; empty when nothing is."""
    counts = [limit.count for limit in limits if limit.degree == degree]
    common = math.gcd(*counts) if counts else 0
    return [candidate for candidate in range(1, common + 1) if common % candidate == 0]


def _sentence(violated: Sequence[Limit], value: int, choices: Sequence[int]) -> str:
    things = " and ".join(f"{limit.count} {limit.of}{f' ({limit.reason})' * bool(limit.reason)}" for limit in violated)
    return f"{value} does not divide {things}; possible: {', '.join(map(str, choices))}"
