"""Ranks that share every sequence: each holds an equal share of the packed tokens (context parallelism).

What mixers ask of it is `prl.blocks.context.SequenceShard`; beside that, small columns of the tokens that are scored
are brought together, so that a loss sees whole samples wherever their tokens lie.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# Under the names that torch gave them before 2.13 they are deprecated.
all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@attrs.frozen(kw_only=True, eq=False)
class ContextGroup:
    """This rank among those that share its sequences; a `SequenceShard`."""

    index: int
    count: int
    group: ProcessGroup
    divides_heads: bool = False

    def whole(self, x: Tensor) -> Tensor:
        """x [T, ...] of this rank -> [count * T, ...] of all ranks in order; gradients add up."""
        gathered: Tensor = _Gather.apply(x, self.group, self.count)  # type: ignore[no-untyped-call]
        return gathered

    def by_heads(self, x: Tensor) -> Tensor:
        """x [T, count * H, D] of this rank -> [count * T, H, D]: all tokens, and this rank's heads."""
        for_each = torch.unflatten(x, 1, (self.count, -1)).transpose(0, 1)  # [ranks, T, heads of one, D]
        return self._exchanged(for_each).flatten(0, 1)

    def by_tokens(self, x: Tensor) -> Tensor:
        """[count * T, H, D] -> [T, count * H, D]"""
        for_each = torch.unflatten(x, 0, (self.count, -1))  # [ranks, T, heads of one, D]
        return self._exchanged(for_each).transpose(0, 1).flatten(1, 2)

    def _exchanged(self, for_each: Tensor) -> Tensor:
        """[ranks, ...] for each rank -> [ranks, ...] from each."""
        from_each: Tensor = _Exchange.apply(for_each, self.group)  # type: ignore[no-untyped-call]
        return from_each

    def columns(self, columns: Tensor) -> tuple[Tensor, slice]:
        """columns [N, C] of this rank, any N -> [sum of N, C] of all ranks in order, and where this rank's are."""
        counts = [torch.empty(1, dtype=torch.int64, device=columns.device) for _ in range(self.count)]
        dist.all_gather(counts, torch.tensor([len(columns)], device=columns.device), group=self.group)
        lengths = torch.cat(counts).tolist()
        padded = columns.new_zeros(max(lengths), columns.shape[1])
        padded[: len(columns)] = columns
        parts = torch.split(_gather(padded, self.group, self.count), max(lengths) or 1)
        start = sum(lengths[: self.index])
        whole = torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)]) if max(lengths) else padded
        return whole, slice(start, start + len(columns))


def in_whole(own: Tensor, whole: Tensor, place: slice) -> Tensor:
    """`whole` [M] with this rank's `own` [N] in its place, through which alone gradients flow.

    Every rank computes the same loss over the whole and keeps the part of its gradient that is its own.
    """
    return torch.cat((whole[: place.start], own, whole[place.stop :]))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, count: int) -> Tensor:
        ctx.group, ctx.count = group, count
        return _gather(x, group, count)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        summed = grad.new_empty(grad.shape[0] // ctx.count, *grad.shape[1:])
        _reduce_scatter(summed, grad.contiguous(), group=ctx.group)
        return summed, None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, for_each: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(for_each, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad, ctx.group), None


def _all_to_all(x: Tensor, group: ProcessGroup) -> Tensor:
    """x [ranks, ...] for each rank -> [ranks, ...] from each."""
    sent = x.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received


def _gather(x: Tensor, group: ProcessGroup, count: int) -> Tensor:
    gathered = x.new_empty(count * x.shape[0], *x.shape[1:])
    all_gather(gathered, x.contiguous(), group=group)
    return gathered
