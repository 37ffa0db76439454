"""`--sweep KEY=A,B,...`: one run per combination of settings, in a folder of their own.

    run.seed = 0, 1 and optimizer.learning_rate = 1e-4, 3e-4
        -> <folder>/0-seed=0-learning_rate=1e-4, 1-seed=0-learning_rate=3e-4, 2-seed=1-..., 3-...

Each is a run as any other: watched, stopped and resumed by its name. Knows nothing of what settings mean; called by
`prl launch`, which composes every run before it makes the first.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import attrs

from prl.errors import UserError


@attrs.frozen(kw_only=True)
class Member:
    """One run of a sweep."""

    name: str
    overrides: tuple[str, ...]


def members(axes: Sequence[str]) -> list[Member]:
    """Every combination, the last axis changing fastest; UserError for an axis that is not `KEY=A,B,...`."""
    parsed = [_axis(axis) for axis in axes]
    keys = [key for key, _ in parsed]
    if len(set(keys)) < len(keys):
        raise UserError(f"--sweep: {', '.join(keys)} names a setting twice")
    combinations = list(itertools.product(*(values for _, values in parsed)))
    width = len(str(len(combinations) - 1))
    return [
        Member(
            name="-".join([f"{index:0{width}}", *map(_word, keys, values)]),
            overrides=tuple(f"{key}={value}" for key, value in zip(keys, values, strict=True)),
        )
        for index, values in enumerate(combinations)
    ]


def _axis(axis: str) -> tuple[str, list[str]]:
    key, equals, listed = axis.partition("=")
    values = [value.strip() for value in _split(listed)]
    if not (key and equals and all(values)):
        raise UserError(f"--sweep {axis!r}: expected KEY=VALUE,VALUE,...")
    return key.strip(), values


def _split(listed: str) -> list[str]:
    """At commas outside brackets and quotes, which are TOML's."""
    return re.findall(r"""(?:"[^"]*"|'[^']*'|\[[^\]]*\]|\{[^}]*\}|[^,])+""", listed) or [""]


def _word(key: str, value: str) -> str:
    """Part of a folder's name."""
    return re.sub(r"[^\w.=+-]+", "_", f"{key.rpartition('.')[2]}={value}")
