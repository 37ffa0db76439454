"""Bytes that a trainer rank receives from others in a step, by axis of the layout, and how long that takes.

    shard      parameters gathered for forward and backward, gradients summed and scattered
    replicate  gradients summed over copies of the model
    context    keys and values (latents, index keys) of earlier tokens, and their gradients
    expert     tokens to the experts that are elsewhere, and back

Collectives of all ranks of a node share the node's wires to other nodes, an exchange of tokens has one wire per device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs

from prl.plan.devices import Rates
from prl.plan.layout import experts_over, sharded_over
from prl.plan.memory import Settings
from prl.train.layout import Layout

if TYPE_CHECKING:
    from prl.train.survey import Kind, Survey


@attrs.frozen(kw_only=True)
class Exchange:
    """Of one axis, for one micro-batch (`replicate`: for one step)."""

    bytes: float
    seconds: float


@attrs.frozen
class _Group:
    """Ranks of one axis and where they are."""

    size: int
    on_node: int

    @classmethod
    def of(cls, size: int, stride: int, rates: Rates) -> _Group:
        return cls(size, max(1, min(size, rates.devices_per_node // stride)))

    def collective(self, volume: float, rates: Rates) -> Exchange:
        """Gather or scatter: every rank ends or begins with `volume` bytes, of which it holds one part."""
        if self.size == 1:
            return Exchange(bytes=0.0, seconds=0.0)
        received = volume * (self.size - 1) / self.size
        outside = volume * (self.size - self.on_node) / self.size
        seconds = max(received / rates.node, outside / (rates.network * self.on_node))
        return Exchange(bytes=received, seconds=seconds)

    def all_to_all(self, volume: float, rates: Rates) -> Exchange:
        """Every rank sends and receives `volume` bytes, evenly from all."""
        if self.size == 1:
            return Exchange(bytes=0.0, seconds=0.0)
        outside = volume * (self.size - self.on_node) / self.size
        inside = volume * (self.on_node - 1) / self.size
        return Exchange(bytes=inside + outside, seconds=max(inside / rates.node, outside / rates.network))


def exchanges(survey: Survey, settings: Settings, tokens: int, rates: Rates) -> Mapping[str, Exchange]:
    """Axis -> what one micro-batch of `tokens` tokens (over all ranks of `context`) takes."""
    layout = settings.layout
    return {
        "shard": _shard(survey, settings, rates),
        "context": _context(survey, settings, tokens, rates),
        "expert": _expert(survey, settings, -(-tokens // layout.context), rates),
    }


def replicate(gradients: int, layout: Layout, rates: Rates) -> Exchange:
    """Of one step: every rank's `gradients` bytes summed with those of the other copies."""
    group = _Group.of(layout.replicate, sharded_over(layout), rates)
    once = group.collective(gradients, rates)
    return Exchange(bytes=2 * once.bytes, seconds=2 * once.seconds)


def _shard(survey: Survey, settings: Settings, rates: Rates) -> Exchange:
    """Gathered for the forward pass and again for the backward; what is no layer is gathered once."""
    layout, compute = settings.layout, settings.formats.compute
    volumes = {False: 0.0, True: 0.0}
    for p in survey.parameters:
        volumes[p.expert] += p.size * (2 * compute + (settings.formats.parameter if p.trained else 0))
    dense = _Group.of(sharded_over(layout), 1, rates).collective(volumes[False], rates)
    group = _Group.of(experts_over(layout), layout.expert, rates)
    experts = group.collective(volumes[True] / layout.expert, rates)
    return Exchange(bytes=dense.bytes + experts.bytes, seconds=dense.seconds + experts.seconds)


def _context(survey: Survey, settings: Settings, tokens: int, rates: Rates) -> Exchange:
    """Gathered in the forward pass, and again where that is repeated; gradients are scattered as they were computed."""
    layout = settings.layout
    per_token = sum(
        len(kind.layers) * kind.remembered.per_token * (3 if settings.repeats(*_remembering(kind)) else 2)
        for kind in survey.kinds
    )
    volume = tokens * per_token * settings.formats.compute
    return _Group.of(layout.context, 1, rates).collective(volume, rates)


def _expert(survey: Survey, settings: Settings, tokens: int, rates: Rates) -> Exchange:
    """To the experts and back, forward, backward, and forward again where it is repeated."""
    layout = settings.layout
    per_token = sum(
        len(kind.layers) * kind.routing.per_token * kind.routing.width for kind in survey.kinds if kind.routing
    )
    passes = 3 if settings.repeats("experts") else 2
    volume = 2 * passes * tokens * per_token * settings.formats.compute
    return _Group.of(layout.expert, 1, rates).all_to_all(volume, rates)


def _remembering(kind: Kind) -> set[str]:
    """The mixers of such a layer that look at other tokens."""
    return {*kind.mixers} - {"mlp", "experts"}
