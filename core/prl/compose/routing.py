"""Where a model routes, and whether a run replays it. Imports no numpy: every command asks.

What becomes of an engine's choices is told in `prl.routes`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import attrs

from prl.errors import Problem

if TYPE_CHECKING:
    from prl.compose.compose import Composition
    from prl.providers import Engine, Model


@attrs.frozen(kw_only=True)
class Routing:
    """Where a model routes."""

    layers: tuple[str, ...]
    """[M] names of the decoder layers with experts: `layers.<i>`."""
    experts: int
    """Of every such layer."""
    experts_per_token: int

    @property
    def dtype(self) -> str:
        """Of the narrowest column that holds every expert's number."""
        return "uint8" if self.experts <= 256 else "uint16"

    @property
    def row(self) -> tuple[int, int]:
        """(M, K): what is stored of each token."""
        return len(self.layers), self.experts_per_token

    @property
    def indices(self) -> tuple[int, ...]:
        """[M] the layers' places in the decoder."""
        return tuple(int(name.removeprefix("layers.")) for name in self.layers)


def replayed(composition: Composition) -> Routing | None:
    """Where the run replays routes; None where it does not."""
    run = composition.run
    model, engine = cast("Model", composition.provider(run.model)), cast("Engine", composition.provider(run.engine))
    if run.trainer.router_replay == "off" or model.routing is None or not engine.reports_routes:
        return None
    routing: Routing = composition.load(model.routing)(run.model)
    return routing if routing.layers else None


def problems(composition: Composition) -> list[Problem]:
    """Why routes cannot be replayed, in a run that asks for it."""
    run = composition.run
    if run.trainer.router_replay != "on" or replayed(composition) is not None:
        return []
    model, engine = cast("Model", composition.provider(run.model)), cast("Engine", composition.provider(run.engine))
    if not engine.reports_routes:
        reason = f"engine {engine.name!r} does not report where it sent tokens"
    else:
        reason = f"model {model.name!r} is dense as configured: it has no experts to send tokens to"
    return [Problem("trainer.router_replay", f'"on" is not possible: {reason}; use "auto" or "off"')]
