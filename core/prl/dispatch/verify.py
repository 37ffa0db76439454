"""Does an answer of an environment worker say what it was asked for, in columns that fit together?

The wire guarantees types. This guarantees sense, so that a worker that returns garbage costs an attempt, which is
tried again elsewhere, and never reaches credit, the ledger or a trainer rank. Called for everything that comes from
another process; knows nothing of rewards or staleness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prl.compose.routing import Routing
from prl.errors import InfrastructureError
from prl.messages import RunGroup
from prl.routes import suits
from prl.types import Group, Rollout, Sample

_DEEPEST = 32
"""Levels of a message's content; JSON that goes deeper cannot be written down."""


def verify_group(group: Group, request: RunGroup, newest: int, routing: Routing | None = None) -> None:
    """InfrastructureError unless the group is what `request` asks for; no engine has a version after `newest`, and
    routes are those of a model with `routing`."""
    asked = (request.group_id, request.task, request.attempt, request.version)
    _require(
        (group.group_id, group.task, group.attempt, group.started_version) == asked,
        f"group {request.group_id} (attempt {request.attempt}) was asked for, the answer is group {group.group_id} "
        f"(attempt {group.attempt}) or of another task",
    )
    names = [rollout.rollout_id for rollout in group.rollouts] + [failure.rollout_id for failure in group.failures]
    known = {f"{request.group_id}.{member}" for member in range(request.size)}
    _require(
        len(set(names)) == len(names) and known.issuperset(names),
        f"group {group.group_id} has rollouts {names!s:.200}, not members of {request.size}",
    )
    for rollout in group.rollouts:
        _verify_rollout(rollout, request, newest)
        _verify_large(rollout, request, routing)


def verify_samples(samples: Sequence[Sample]) -> None:
    """InfrastructureError unless every demonstration can be packed."""
    for number, sample in enumerate(samples):
        what = f"demonstration {number}"
        columns = (sample.tokens, sample.sampled, sample.engine_logprobs, sample.versions, sample.advantages)
        _verify_columns(what, (*columns, *sample.weights.values()))
        _require(set(sample.weights) <= {"ce"}, f"{what} belongs to the streams {sorted(sample.weights)}, not to ce")
        _require(not sample.sampled.any() and sample.ref_logprobs is None, f"{what} claims to have been sampled")
        _require(math.isfinite(sample.temperature) and sample.temperature > 0, f"{what} has no temperature")
        _require(bool(sample.tokens.min() >= 0), f"{what} has a negative token")
        _require(not any(weights[0] for weights in sample.weights.values()), f"{what} trains its first token")
        numbers = (sample.engine_logprobs, sample.advantages, *sample.weights.values())
        _require(all(np.isfinite(column).all() for column in numbers), f"{what} has a number that is not finite")


def _verify_rollout(rollout: Rollout, request: RunGroup, newest: int) -> None:
    what = f"rollout {rollout.rollout_id}"
    sampled, versions = rollout.sampled, rollout.versions
    _verify_columns(what, (rollout.tokens, sampled, rollout.logprobs, versions))
    length = len(rollout.tokens)
    _require(bool(rollout.tokens.min() >= 0), f"{what} has a negative token")
    _require(not sampled[0], f"{what} begins with a sampled token, which nothing precedes")
    seen = versions[sampled]
    _require(
        bool((versions[~sampled] == -1).all() and (seen >= 0).all() and (seen <= newest).all()),
        f"{what} has versions from {versions.min()} to {versions.max()}; the newest is {newest}",
    )
    numbers = (rollout.reward, *rollout.metrics.values())
    _require(bool(np.isfinite(rollout.logprobs).all()), f"{what} has a log-probability that is not finite")
    _require(all(map(math.isfinite, numbers)), f"{what} has a reward or metric that is not finite")
    _require(
        rollout.temperature == request.sampling.temperature,
        f"{what} was sampled at temperature {rollout.temperature}, not {request.sampling.temperature}",
    )
    _require(
        all(0 <= turn.start <= turn.end <= length for turn in rollout.turns),
        f"{what} has a turn outside its {length} tokens",
    )
    _require(all(_is_plain(message, _DEEPEST) for message in rollout.messages), f"{what} has a message that is no JSON")


def _verify_large(rollout: Rollout, request: RunGroup, routing: Routing | None) -> None:
    what, length = f"rollout {rollout.rollout_id}", len(rollout.tokens)
    own = f"{request.group_id}.{request.attempt}."
    for pieces in rollout.large.values():
        _require(
            all(piece.shape and piece.file.startswith(own) for piece in pieces)
            and sum(piece.shape[0] for piece in pieces) == length,
            f"{what} refers to large columns that are not its own",
        )
    _require(
        suits(rollout.large, routing), f"{what} has large columns {sorted(rollout.large)} unlike the model's routes"
    )


def _verify_columns(what: str, columns: Sequence[np.ndarray[Any, Any]]) -> None:
    shapes = [column.shape for column in columns]
    _require(
        len(set(shapes)) == 1 and len(shapes[0]) == 1 and shapes[0][0] > 0,
        f"{what} has columns of shapes {shapes}; they must be equally long, and not empty",
    )


def _is_plain(value: Any, depth: int) -> bool:
    """Whether JSON can say it."""
    if value is None or isinstance(value, str | bool | int | float):
        return True
    if depth == 0:
        return False
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(entry, depth - 1) for key, entry in value.items())
    return isinstance(value, list | tuple) and all(_is_plain(entry, depth - 1) for entry in value)


def _require(sound: bool, sentence: str) -> None:
    if not sound:
        raise InfrastructureError(f"the worker's answer makes no sense: {sentence}")
