"""One config under several settings: which ones, and what comes of each."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from prl.compose.compose import Composition
from prl.compose.toml import flatten
from prl.errors import UserError
from prl.simulate.assumptions import Assumptions
from prl.simulate.figures import Figures
from prl.simulate.run import simulate

_BOUND, _GROUP_SIZE = "scheduler.max_staleness", "rollouts.group_size"
_LIST_INDEX = re.compile(r"\.(\d+)\b")  # as --set writes it; a flat config has brackets


@attrs.frozen(kw_only=True)
class Outcome:
    """A setting and what came of it."""

    changes: Mapping[str, tuple[Any, Any]]
    """Dotted path -> (value of the config as it is, or None, and value here); empty for the config as it is."""
    figures: Figures

    @property
    def name(self) -> str:
        return ", ".join(f"{path} = {value}" for path, (_, value) in self.changes.items()) or "as configured"


def compare(
    composed: Callable[[Sequence[str]], Composition], assumptions: Assumptions, *, sweep: Sequence[str], steps: int
) -> list[Outcome]:
    """The config as it is, then every setting of `sweep` that differs from it; without a sweep, its neighbours.

    `composed` composes the config under further overrides.
    """
    configured = composed(())
    config = flatten(configured.resolved)
    outcomes = [Outcome(changes={}, figures=simulate(configured, assumptions, steps=steps))]
    for overrides in settings(sweep) if sweep else neighbours(config):
        composition = composed(overrides)
        changes = _changes(overrides, config, flatten(composition.resolved))
        if changes:
            outcomes.append(Outcome(changes=changes, figures=simulate(composition, assumptions, steps=steps)))
    return outcomes


def _changes(
    overrides: Sequence[str], before: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Those of the overridden paths whose value differs between two flat configs."""
    paths = [_LIST_INDEX.sub(r"[\1]", override.partition("=")[0]) for override in overrides]
    return {path: (before.get(path), after.get(path)) for path in paths if before.get(path) != after.get(path)}


# --- settings ---------------------------------------------------------------------------------------------------------
def settings(sweep: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of `section.key=a,b,c` specifications, as overrides for `--set`.

    Example:
        >>> settings(["scheduler.max_staleness=0,1", "rollouts.group_size=4"])
        [('scheduler.max_staleness=0', 'rollouts.group_size=4'), ('scheduler.max_staleness=1', 'rollouts.group_size=4')]
    """
    axes = []
    for specification in sweep:
        path, equals, values = specification.partition("=")
        if not equals or not all(value.strip() for value in values.split(",")):
            raise UserError(f"--sweep {specification}: expected section.key=value,value,...")
        axes.append([f"{path.strip()}={value.strip()}" for value in values.split(",")])
    return list(itertools.product(*axes))


def neighbours(config: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One step of the staleness bound down and up, half and twice the group size; `config` is flat."""
    size = config[_GROUP_SIZE]
    changes = [(_GROUP_SIZE, value) for value in (size // 2, size * 2) if value]
    if isinstance(config.get(_BOUND), int):
        bound = config[_BOUND]
        changes = [(_BOUND, value) for value in (bound - 1, bound + 1) if value >= 0] + changes
    return [(f"{path}={value}",) for path, value in changes]
