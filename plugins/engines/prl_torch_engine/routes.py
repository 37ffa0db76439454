"""Which experts the tokens in every row were sent to, and by which policy version; kept as the caches are.

Written after every forward pass, copied with a row's keys and values, so that a reused prefix brings its routes along.
Called by `rows.py`, `scheduler.py` and `batch.py`; exists only where the run replays routes.
"""

from __future__ import annotations

import torch
from prl.blocks.context import Context
from prl.blocks.routing import RouteLog
from prl.compose.routing import Routing
from prl.types import Routes
from torch import Tensor


class RouteTable:
    """Routes of `count` rows of `length` tokens."""

    def __init__(self, routing: Routing, *, count: int, length: int, device: torch.device) -> None:
        self._routing = routing
        # torch computes with few unsigned types: the bytes of uint16 are kept as int16.
        dtype = torch.uint8 if routing.dtype == "uint8" else torch.int16
        self._experts = torch.zeros(count, length, *routing.row, dtype=dtype, device=device)
        self._versions = torch.full((count, length), -1, dtype=torch.int32, device=device)
        self.version = -1
        """Of the weights being served."""

    def begin(self, context: Context) -> None:
        """Let the forward pass with `context` say where it sends tokens."""
        context.routes = RouteLog(chosen={})

    def end(self, context: Context) -> None:
        """Keep what the pass said."""
        assert context.routes is not None, "begin came first"
        assert context.routes.chosen is not None, "begin asked for it"
        chosen = context.routes.chosen
        rows, positions = _rows(context), context.positions
        experts = torch.stack([chosen[layer] for layer in self._routing.indices], 1)  # [T, M, K]
        self._experts[rows, positions] = experts.to(self._experts.dtype)
        self._versions[rows, positions] = self.version

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` tokens of one row into another."""
        self._experts[target, :length] = self._experts[source, :length]
        self._versions[target, :length] = self._versions[source, :length]

    def read(self, row: int, start: int, stop: int) -> Routes:
        """Of the tokens `start` to `stop` in a row."""
        start = min(start, stop)
        experts = self._experts[row, start:stop].cpu().numpy().copy()
        return Routes(
            layers=self._routing.layers,
            experts=experts.view(self._routing.dtype),
            versions=self._versions[row, start:stop].cpu().numpy().copy(),
            start=start,
        )


def _rows(context: Context) -> Tensor:
    """[T] row of each token."""
    rows, device = context.rows, context.positions.device
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=device)
    assert rows is not None, "a context with caches has rows"
    lengths = torch.tensor(context.lengths, device=device)
    return rows.to(device).repeat_interleave(lengths, output_size=len(context.positions))
