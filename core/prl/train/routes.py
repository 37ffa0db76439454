"""The engine's choices of experts for one micro-batch: read, checked, replayed, compared with the trainer's own.

A token without a route that can be followed is routed by the trainer's own router, and counted: `routes/missing` where
the engine said nothing, `routes/refused` where what it said cannot be read or is no choice of this model's experts. The
last token of a sample predicts nothing and no engine computes it, so it does not count; nor do samples in which nothing
was sampled. Called by `prl.train.step`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prl.blocks.context import SharedPrefixes
from prl.blocks.routing import Replay, RouteLog
from prl.columns import ColumnFolder
from prl.compose.routing import Routing
from prl.errors import InfrastructureError
from prl.routes import EXPERTS, VERSIONS, suits
from prl.train.rows import Rows
from prl.types import Bool, Int32, MicroBatch, Pieces

logger = logging.getLogger(__name__)


@attrs.frozen(kw_only=True, eq=False)
class HostRoutes:
    """The columns of a micro-batch of `T` tokens, on the host."""

    routing: Routing
    experts: NDArray[Any]  # [T, M, K] in the type that travelled
    versions: Int32  # [T] -1 where nothing is known
    counted: Bool  # [T] tokens that should have a route
    refused: Bool  # [T] of samples whose columns were refused

    def log(self, rows: Rows, device: torch.device) -> RouteLog:
        """What the forward pass over `rows` is told. Tokens that a row computes together follow the routes of one."""
        total = len(rows.tokens) if rows.kept is None else int(rows.cu_seqlens[-1])
        padding = total - len(self.versions)
        # torch computes with few unsigned types; numbers of experts fit int16 as well.
        numbers = self.experts if self.experts.dtype == np.uint8 else self.experts.view(np.int16)
        experts = np.pad(numbers, ((0, padding), (0, 0), (0, 0)))
        known = np.pad(self.versions >= 0, (0, padding))
        if rows.kept is not None:
            experts, known = experts[rows.kept], known[rows.kept]
        replay = Replay.of(
            torch.from_numpy(experts).to(device),
            torch.from_numpy(known).to(device),
            layers=self.routing.indices,
            count=self.routing.experts,
        )
        return RouteLog(replay=replay)

    @torch.no_grad()
    def add_sums(self, log: RouteLog, shared: SharedPrefixes | None, version: int, sums: dict[str, Tensor]) -> None:
        """How many tokens were replayed, and how many the trainer's routers would have sent elsewhere, by layer.

        `fresh` are those whose routes the weights being trained chose: there the routers differ by rounding alone.
        """
        assert log.replay is not None, "made by `log`"
        device = log.replay.known.device

        def of_tokens(column: Tensor) -> Tensor:
            return (column if shared is None else shared.expand(column))[: len(self.versions)]

        def put(column: NDArray[np.bool_]) -> Tensor:
            return torch.from_numpy(column).to(device)

        known, counted, told = of_tokens(log.replay.known), put(self.counted), put(self.versions >= 0)
        replayed = known & counted
        fresh = replayed & put(self.versions == version)
        refused = put(self.refused) | (told & ~known)
        sums["routes/count"] += counted.sum()
        sums["routes/replayed"] += replayed.sum()
        sums["routes/refused"] += (counted & refused & ~known).sum()
        sums["routes/missing"] += (counted & ~refused & ~known).sum()
        sums["routes_fresh/count"] += fresh.sum() * len(self.routing.layers)
        for name, layer in zip(self.routing.layers, self.routing.indices, strict=True):
            if layer in log.differing:
                differing = of_tokens(log.differing[layer])
                sums[f"routes/differ/{name}"] += (differing & replayed).sum()
                sums["routes_fresh/differ"] += (differing & fresh).sum()


@attrs.frozen(kw_only=True, eq=False)
class RouteReader:
    """Reads the routes of a run's micro-batches."""

    folder: ColumnFolder
    routing: Routing

    def read(self, micro: MicroBatch) -> HostRoutes:
        """Every column that the tokens of the micro-batch refer to, verified; what is wrong with one is logged."""
        window = _window(micro)
        routes = HostRoutes(
            routing=self.routing,
            experts=np.zeros((len(window), *self.routing.row), self.routing.dtype),
            versions=np.full(len(window), -1, np.int32),
            counted=np.zeros(len(window), np.bool_),
            refused=np.zeros(len(window), np.bool_),
        )
        for sample, bounds in enumerate(pairwise(micro.cu_seqlens.tolist())):
            own = _within(bounds, window)
            large = {name: pieces[sample] for name, pieces in micro.large.items() if pieces[sample]}
            if large or micro.sampled[own].any():
                routes.counted[_within((bounds[0], bounds[1] - 1), window)] = True
            try:
                self._read_sample(large, routes, bounds, window)
            except InfrastructureError as error:
                logger.warning("routes of a sample are not replayed: %s", error)
                routes.versions[own] = -1
                routes.refused[own] = True
        return routes

    def _read_sample(
        self, large: Mapping[str, Pieces], routes: HostRoutes, bounds: tuple[int, int], window: range
    ) -> None:
        if not suits(large, self.routing):
            raise InfrastructureError(f"columns {sorted(large)} of other types or shapes than the model's routes")
        for name, target in ((EXPERTS, routes.experts), (VERSIONS, routes.versions)):
            start = bounds[0]
            for piece in large.get(name, ()):
                end = start + piece.shape[0]
                if end > bounds[1]:
                    raise InfrastructureError(f"column {piece.file} has more rows than its sample has tokens")
                own = _within((start, end), window)
                if own.start < own.stop:
                    first = window.start + own.start - start
                    target[own] = self.folder.read(piece)[first : first + own.stop - own.start]
                start = end


def _window(micro: MicroBatch) -> range:
    """Which tokens of the packed whole this rank computes."""
    if micro.shard is None:
        return range(len(micro.tokens))
    first = micro.shard.index * micro.shard.rows
    return range(first, first + min(micro.shard.rows, len(micro.tokens)))


def _within(bounds: tuple[int, int], window: range) -> slice:
    """Where the tokens `bounds` of the packed whole lie among those of the window; empty when they do not."""
    start, end = (min(max(bound, window.start), window.stop) - window.start for bound in bounds)
    return slice(start, max(start, end))
