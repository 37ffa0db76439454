"""Experts divided over ranks: tokens travel to their experts and back (expert parallelism).

Every rank holds the experts of one block. An all-to-all takes each token to the rank of its expert, in the order in
which the ranks have sorted them, and another brings the output back to where the token was: what is summed, and in
which order, does not depend on where experts are.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from prl.blocks.moe import reorder


@attrs.frozen(kw_only=True, eq=False)
class AllToAll:
    """A `prl.blocks.moe.RunExperts` for experts that lie on the ranks of `group`, in order, equally many on each."""

    group: ProcessGroup
    count: int
    """Ranks of the group."""

    def __call__(self, experts: nn.Module, x: Tensor, counts: Tensor) -> Tensor:
        """x [N, D] sorted by expert, counts [E] over all experts -> the experts' outputs [N, D]."""
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts.contiguous(), group=self.group)
        sending = counts.view(self.count, -1).sum(1).tolist()
        per_rank = received.view(self.count, -1)  # [ranks, experts here]
        receiving = per_rank.sum(1).tolist()
        arrived = _exchange(x, sending, receiving, self.group)  # by rank, then by expert
        order = _by_expert(per_rank)
        inverse = order.argsort()
        outputs = experts(reorder(arrived, order, inverse), per_rank.sum(0).cumsum(0).int())
        return _exchange(reorder(outputs, inverse, order), receiving, sending, self.group)


def _by_expert(per_rank: Tensor) -> Tensor:
    """per_rank [R, E] tokens that came from each rank for each expert -> [M] their order by expert, then by rank."""
    experts = torch.arange(per_rank.shape[1], device=per_rank.device).repeat(per_rank.shape[0])
    return experts.repeat_interleave(per_rank.flatten()).argsort(stable=True)


def _exchange(x: Tensor, sending: list[int], receiving: list[int], group: ProcessGroup) -> Tensor:
    exchanged: Tensor = _Exchange.apply(x, sending, receiving, group)  # type: ignore[no-untyped-call]
    return exchanged


class _Exchange(torch.autograd.Function):
    """All-to-all of rows; its gradient goes back the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sending: list[int], receiving: list[int], group: ProcessGroup) -> Tensor:
        ctx.route = sending, receiving, group
        return _all_to_all(x, sending, receiving, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        sending, receiving, group = ctx.route
        return _all_to_all(grad, receiving, sending, group), None, None, None


def _all_to_all(x: Tensor, sending: list[int], receiving: list[int], group: ProcessGroup) -> Tensor:
    received = x.new_empty(sum(receiving), *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), receiving, sending, group=group)
    return received
