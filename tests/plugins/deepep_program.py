"""What each of two ranks of test_deepep.py runs: a mixture by all-to-all and by the plugin's dispatch, gradients beside
each other, as they come and with the mixture computed again in the backward pass.

DeepEP has no CPU: in the place of the module stands one whose buffer does over gloo what DeepEP's is documented to.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import torch
import torch.distributed as dist
from prl.blocks import kernels
from prl.blocks.context import Context
from prl.blocks.kernels import SEAMS
from prl.blocks.moe import Experts, MixtureOfExperts, SoftmaxRouter
from prl.train.parallel.experts import AllToAll
from prl_deepep import exchange
from prl_deepep.kernel import dispatch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

HIDDEN, EXPERTS, CHOICES = 12, 6, 3


@attrs.frozen(eq=False)
class Handle:
    """R tokens arrived, of which the first column of the metadata says from where."""

    recv_src_metadata: Tensor
    num_recv_tokens_per_expert_list: list[int]
    topk_idx: Tensor
    """Of this rank's own tokens [T, K]."""
    room: int
    num_sms: int


class ElasticBuffer:
    """`deep_ep.ElasticBuffer` of version 2.1 without its options. Tokens arrive in another order every time."""

    made: list[ElasticBuffer] = []  # noqa: RUF012

    def __init__(
        self, group: Any, *, num_max_tokens_per_rank: int, hidden: int, num_topk: int, explicitly_destroy: bool
    ) -> None:
        self.group, self.size, self.room = group, dist.get_world_size(group), num_max_tokens_per_rank
        self.made.append(self)
        self.draw = torch.Generator().manual_seed(dist.get_rank(group))

    def get_theoretical_num_sms(self, experts: int, choices: int) -> int:
        return experts // (choices - 3)  # it divides by the speed of a network that it may not know

    def destroy(self) -> None:
        self.group = None

    def dispatch(
        self,
        x: Tensor,
        *,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_experts: int = 0,
        num_max_tokens_per_rank: int = 0,
        handle: Handle | None = None,
        num_sms: int,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Handle, None]:
        if handle is not None:
            everyone = self._everyone(x, handle.room)
            return everyone[handle.recv_src_metadata[:, 0]], None, None, handle, None
        assert topk_idx is not None
        assert topk_weights is not None
        room = num_max_tokens_per_rank
        x, weights, chosen = (self._everyone(t, room) for t in (x, topk_weights, topk_idx + 1))
        here = num_experts // self.size
        places = chosen - 1 - here * dist.get_rank(self.group)
        places[(places < 0) | (places >= here) | (chosen == 0)] = -1
        source = (places >= 0).any(1).nonzero()[:, 0]
        source = source[torch.randperm(len(source), generator=self.draw)]
        places = places[source]
        weights = weights[source].masked_fill(places < 0, float("nan"))  # what is there is not said
        counts = torch.bincount(places[places >= 0], minlength=here).tolist()
        handle = Handle(source[:, None].int(), counts, topk_idx.clone(), room, num_sms)
        return x[source], places, weights, handle, None

    def combine(
        self, x: Tensor, *, handle: Handle, topk_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, None]:
        return self._returned(x, handle), None if topk_weights is None else self._returned(topk_weights, handle), None

    def _everyone(self, own: Tensor, room: int) -> Tensor:
        """own [T, ...] of each rank -> [ranks * room, ...]."""
        assert own.is_contiguous()
        padded = torch.cat([own, own.new_zeros(room - len(own), *own.shape[1:])])
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat(parts)

    def _returned(self, arrived: Tensor, handle: Handle) -> Tensor:
        """arrived [R, ...] -> their sums where they came from [T, ...]."""
        assert arrived.is_contiguous()
        everywhere = arrived.new_zeros(self.size * handle.room, *arrived.shape[1:])
        everywhere.index_add_(0, handle.recv_src_metadata[:, 0], arrived)
        dist.all_reduce(everywhere, group=self.group)
        first = handle.room * dist.get_rank(self.group)
        return everywhere[first : first + len(handle.topk_idx)]


def stand_in() -> None:
    """In the place of DeepEP, where numbers need not be bfloat16."""
    module = ModuleType("deep_ep")
    module.ElasticBuffer = ElasticBuffer  # type: ignore[attr-defined]
    sys.modules["deep_ep"] = module
    exchange.check = lambda x: None


def mixture(rank: int) -> MixtureOfExperts:
    """With the experts of one rank."""
    torch.manual_seed(0)
    router = SoftmaxRouter(hidden_size=HIDDEN, experts=EXPERTS, experts_per_token=CHOICES, renormalise=True)
    made = MixtureOfExperts(router, Experts(experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=8))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    for parameter in made.experts.parameters():
        parameter.data = parameter.data.chunk(2)[rank].clone()
    made.run_experts = AllToAll(group=dist.group.WORLD, count=2)  # type: ignore[arg-type]
    return made


def trained(rank: int, *, again: bool = False, one_sided: bool = False) -> list[Tensor]:
    """Outputs and gradients of this rank's own tokens: more of them on rank 1. `one_sided`: all of the first experts"""
    made = mixture(rank)
    tokens = (5, 9)[rank]
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    if one_sided:
        made.gate.choose = lambda p: torch.arange(CHOICES).expand(len(p), -1)  # type: ignore[method-assign, union-attr, assignment]
    arguments = x, Context.packed(torch.tensor([0, tokens])), 0
    outputs = checkpoint(made, *arguments, use_reentrant=False) if again else made(*arguments)
    outputs.square().sum().backward()
    return [outputs.detach(), x.grad, *(parameter.grad for parameter in made.parameters())]  # type: ignore[list-item]


CASES: dict[str, dict[str, bool]] = {"plain": {}, "again": {"again": True}, "one_sided": {"one_sided": True}}


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    expected = {name: trained(rank, **case) for name, case in CASES.items()}
    stand_in()
    SEAMS["dispatch"].chosen = dispatch
    found = {name: trained(rank, **case) for name, case in CASES.items()}
    differences = {
        name: [
            ((a - b).norm() / b.norm().clamp_min(1e-9)).item() for a, b in zip(found[name], expected[name], strict=True)
        ]
        for name in CASES
    }
    kernels.release()
    buffers = [{"room": buffer.room, "given_back": buffer.group is None} for buffer in ElasticBuffer.made]
    (folder / f"{rank}.json").write_text(json.dumps({"differences": differences, "buffers": buffers}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
