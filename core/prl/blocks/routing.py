"""Which experts the tokens of one forward pass are sent to: told to the mixtures, or asked of them.

A `RouteLog` in the context is seen by every mixture of experts. The embedded engine records what routers choose; the
trainer replays what an engine recorded, and learns where its own routers would have chosen otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor


@attrs.frozen(kw_only=True, eq=False)
class Replay:
    """Choices to be followed, for `T` packed tokens and `M` layers."""

    experts: Tensor
    """[T, M, K] uint8 or int16."""
    known: Tensor
    """[T] bool: where False, `experts` means nothing and routers choose for themselves."""
    places: Mapping[int, int]
    """Index of a decoder layer -> its place along M."""

    @classmethod
    def of(cls, experts: Tensor, known: Tensor, *, layers: Sequence[int], count: int) -> Replay:
        """`layers` are the decoder's, in the order of M. A token with a row that is no choice among `count` experts,
        such as one of them twice, is not known."""
        ordered = experts.sort(-1).values
        sound = (ordered[..., -1] < count) & (ordered[..., 0] >= 0) & (ordered[..., 1:] != ordered[..., :-1]).all(-1)
        places = {layer: place for place, layer in enumerate(layers)}
        return cls(experts=experts, known=known & sound.all(-1), places=places)


@attrs.define(kw_only=True, eq=False)
class RouteLog:
    """One forward pass, layer by layer. What it holds does not depend on how often a layer is computed."""

    replay: Replay | None = None
    chosen: dict[int, Tensor] | None = None
    """Decoder layer -> [T, K] int64, what its router chose; filled where it is a dict to begin with."""
    differing: dict[int, Tensor] = attrs.field(factory=dict)
    """Decoder layer -> [T] bool, tokens that its router would have sent elsewhere than was replayed."""

    def follow(self, layer: int, own: Tensor) -> Tensor:
        """own [T, K], the choice of the layer's router -> where tokens go [T, K].

        Of one set of experts the router's order is kept: then replay changes no bit of the sum over them.
        """
        if self.chosen is not None:
            self.chosen[layer] = own
        if self.replay is None or layer not in self.replay.places:
            return own
        given = self.replay.experts[:, self.replay.places[layer]].to(own.dtype)
        differs = (given.sort(-1).values != own.sort(-1).values).any(-1) & self.replay.known
        self.differing[layer] = differs
        return torch.where(differs[:, None], given, own)
