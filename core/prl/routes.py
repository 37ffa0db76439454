"""Router replay: the trainer sends a token to the experts the engine sent it to (R3; Ma et al. 2025, arXiv:2510.11370).

A router's best experts can be nearly tied, and engine and trainer round differently. Where they choose differently, the
trainer would score a token under another network than the one that sampled it. So the engine's choices come along:

    engine               Completion.routes, by the names of layers
    environment worker   checks them, puts layers in the model's order, joins turns, stores them   (this module)
    controller           forwards references
    trainer rank         checks again, replays, recomputes the gates                               (`prl.train.routes`)

A later turn adds the routes of its own tokens: those of earlier tokens stay what they were when they were sampled, with
the version that chose them. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from numpy.typing import NDArray

from prl.compose.routing import Routing
from prl.errors import InfrastructureError
from prl.types import ColumnReference, Int32, Pieces, Routes

if TYPE_CHECKING:
    from prl.columns import ColumnFolder

EXPERTS = "routes"
"""Name of the large column [L, M, K] of expert numbers, layers in the order of `Routing.layers`."""
VERSIONS = "route_versions"
"""Name of the large column [L] int32: the policy version that chose, -1 where nothing is known."""


# --- what an engine said ----------------------------------------------------------------------------------------------
def checked(routes: Routes, routing: Routing, *, tokens: int) -> Routes:
    """The same for the model's layers alone, in their order; `tokens` are prompt and completion.

    InfrastructureError when they contradict themselves, the model or the number of tokens.
    """
    experts, count = routes.experts, len(routes.versions)
    places = {name: place for place, name in enumerate(routes.layers)}
    shape = (count, len(routes.layers), routing.experts_per_token)
    _require(experts.shape == shape, f"they have shape {experts.shape}, expected {shape}")
    _require(
        experts.dtype == routing.dtype, f"{experts.dtype} is not {routing.dtype}, as for {routing.experts} experts"
    )
    _require(len(places) == len(routes.layers), "two layers have one name")
    missing = [name for name in routing.layers if name not in places]
    _require(not missing, f"{', '.join(missing)} are missing among the layers {', '.join(places)[:200]}")
    _require(
        0 <= routes.start <= routes.start + count <= tokens,
        f"they are of tokens {routes.start} to {routes.start + count} where there are {tokens}",
    )
    if routes.layers != routing.layers:
        experts = experts[:, [places[name] for name in routing.layers]]
    highest = int(experts[routes.versions >= 0].max(initial=0))
    _require(highest < routing.experts, f"they name expert {highest} of {routing.experts}")
    return attrs.evolve(routes, layers=routing.layers, experts=experts)


def _require(sound: bool, sentence: str) -> None:
    if not sound:
        raise InfrastructureError(f"the engine's routes make no sense: {sentence}")


# --- what a conversation went through ---------------------------------------------------------------------------------
@attrs.define(eq=False)
class RouteRecord:
    """The routes of one conversation, turn after turn."""

    turns: list[Routes] = attrs.field(factory=list)

    @property
    def known(self) -> int:
        """Tokens whose routes need not be asked for again."""
        return max((routes.start + len(routes.versions) for routes in self.turns), default=0)

    def add(self, routes: Routes | None) -> None:
        if routes is not None:
            self.turns.append(routes)

    def columns(self, length: int) -> dict[str, NDArray[Any]]:
        """[L, M, K] and [L] for a conversation of `length` tokens; empty when no turn brought any."""
        if not self.turns:
            return {}
        experts = np.zeros((length, *self.turns[0].experts.shape[1:]), self.turns[0].experts.dtype)
        versions: Int32 = np.full(length, -1, np.int32)
        for routes in self.turns:
            rows = slice(routes.start, routes.start + len(routes.versions))
            new = (versions[rows] < 0) & (routes.versions >= 0)
            experts[rows][new] = routes.experts[new]
            versions[rows][new] = routes.versions[new]
        return {EXPERTS: experts, VERSIONS: versions}


def until(routes: Routes | None, end: int) -> Routes | None:
    """The rows of tokens before `end`."""
    if routes is None:
        return None
    count = max(0, end - routes.start)
    return attrs.evolve(routes, experts=routes.experts[:count], versions=routes.versions[:count])


def joined(first: Routes | None, second: Routes | None) -> Routes | None:
    """The rows of both, where `second` goes on after `first`; what is not told of stays unknown."""
    if first is None or second is None:
        return first or second
    end = first.start + len(first.versions)
    if second.start != end or second.layers != first.layers:
        return first
    return attrs.evolve(
        first,
        experts=np.concatenate([first.experts, second.experts]),
        versions=np.concatenate([first.versions, second.versions]),
    )


def store(
    columns: dict[str, NDArray[Any]], folder: ColumnFolder, *, opening: int, group_id: int, attempt: int
) -> dict[str, Pieces]:
    """Write the columns of one rollout in two pieces: its `opening` tokens, which siblings share, and the rest."""
    if not columns:
        return {}
    pieces: dict[str, list[ColumnReference]] = {name: [] for name in columns}
    for part in (slice(0, opening), slice(opening, None)):
        cut = {name: column[part] for name, column in columns.items()}
        for name, reference in folder.write(cut, group_id=group_id, attempt=attempt).items():
            pieces[name].append(reference)
    return {name: tuple(references) for name, references in pieces.items()}


# --- what references claim --------------------------------------------------------------------------------------------
def suits(large: Mapping[str, Pieces], routing: Routing | None) -> bool:
    """Whether what a rollout refers to as routes has the type and shape of the model's."""
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    if routing is not None:
        expected = {EXPERTS: (str(routing.dtype), routing.row), VERSIONS: ("int32", ())}
    told = {EXPERTS, VERSIONS} & set(large)
    if told and told != set(expected):
        return False
    return all((piece.dtype, piece.shape[1:]) == expected[name] for name in told for piece in large[name])
