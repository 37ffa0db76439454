"""A dataset of the reasoning-gym package from its name and parameters, or a sentence about what is wrong with them.

Importing this module imports reasoning_gym, which takes a second or two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from prl.compose.discover import did_you_mean
from prl.errors import UserError
from reasoning_gym.factory import DATASETS, create_dataset

from prl_reasoning_gym import Family

_OURS = frozenset({"seed", "size"})


def create(family: Family, *, seed: int, size: int) -> Any:
    """The ProceduralDataset with `size` items; UserError names the dataset, or its parameters."""
    name = family.dataset
    if name not in DATASETS:
        raise UserError(f"reasoning_gym has no dataset {name!r}{did_you_mean(name, DATASETS)}")
    _check_names(family)
    try:
        return create_dataset(name, seed=seed, size=size, **family.parameters)
    except (AssertionError, TypeError, ValueError) as error:
        values = ", ".join(f"{key} = {value!r}" for key, value in family.parameters.items()) or "none given"
        raise UserError(f"reasoning_gym's {name} refuses its parameters ({values}): {error}") from error


def _check_names(family: Family) -> None:
    known = _parameters(family.dataset)
    for key in family.parameters:
        if key in _OURS:
            raise UserError(f"{key!r} is no parameter of {family.dataset}: the section's size and run.seed decide it")
        if key not in known:
            described = ", ".join(f"{name} = {default!r}" for name, default in known.items())
            raise UserError(
                f"reasoning_gym's {family.dataset} has no parameter {key!r}{did_you_mean(key, known)}; "
                f"it has, with their defaults: {described}"
            )


def _parameters(name: str) -> dict[str, Any]:
    """The dataset's own parameters and their defaults."""
    _, config = DATASETS[name]
    return {
        field.name: field.default_factory() if callable(field.default_factory) else field.default
        for field in dataclasses.fields(config)
        if field.name not in _OURS
    }


def questions(dataset: Any, name: str) -> Iterator[str]:
    """The questions of a dataset's items, in order; some datasets find out only then that they have fewer."""
    for number in range(len(dataset)):
        try:
            question = dataset[number]["question"]
        except IndexError:
            return
        except Exception as error:  # generators fail in many ways on parameters that cannot be satisfied
            raise UserError(f"reasoning_gym's {name} cannot make item {number} with its parameters: {error}") from error
        yield question
