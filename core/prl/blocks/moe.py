"""Sparse mixture of experts: a router sends every token to its best experts, whose outputs are summed by weight.

Tokens are sorted by expert and each expert multiplies its own block (grouped products): no capacity, no dropped tokens,
no loop over experts, and the same result for the same tokens on every run.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from prl.blocks.context import Context
from prl.blocks.mlp import swiglu


class SoftmaxRouter(nn.Module):
    """Chooses by the softmax over all experts; weights may be renormalised over the chosen. Computed in float32."""

    def __init__(self, *, hidden_size: int, experts: int, experts_per_token: int, renormalise: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))
        self.experts_per_token = experts_per_token
        self.renormalise = renormalise

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, hidden] -> weights [T, K] float32, chosen experts [T, K] int64."""
        probabilities = functional.linear(x.float(), self.weight.float()).softmax(-1)
        return self.weigh(probabilities, self.choose(probabilities))

    def choose(self, probabilities: Tensor) -> Tensor:
        """probabilities [T, E] -> the K most probable experts [T, K]."""
        return probabilities.detach().topk(self.experts_per_token, -1).indices

    def weigh(self, probabilities: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of chosen experts [T, K], through which the router learns; and the choice itself."""
        weights = probabilities.gather(1, chosen)
        return weights / weights.sum(-1, keepdim=True) if self.renormalise else weights, chosen


class Experts(nn.Module):
    """Gated feed-forward experts with stacked weights: gate_up_proj [E, 2 F, hidden], down_proj [E, hidden, F]."""

    def __init__(self, *, experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [N, hidden] sorted by expert, offsets [E] int32 end of each expert's block -> [N, hidden]."""
        gate_up = functional.grouped_mm(x, self.gate_up_proj.transpose(1, 2), offs=offsets)
        return functional.grouped_mm(swiglu(gate_up), self.down_proj.transpose(1, 2), offs=offsets)


class MixtureOfExperts(nn.Module):
    """A mixer: router and experts."""

    def __init__(self, router: SoftmaxRouter, experts: Experts) -> None:
        super().__init__()
        self.gate = router
        self.experts = experts

    def forward(self, x: Tensor, context: Context, layer_index: int) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        weights, chosen = self.gate(x)
        tokens, count = chosen.shape
        order = chosen.flatten().argsort(stable=True)
        offsets = torch.bincount(chosen.flatten(), minlength=len(self.gate.weight)).cumsum(0).int()
        # Copies first, then a permutation: a gather with repeats would add gradients in no fixed order on a GPU.
        copies = x[:, None].expand(-1, count, -1).flatten(0, 1)
        sorted_outputs: Tensor = self.experts(copies.index_select(0, order), offsets)
        outputs = sorted_outputs.index_select(0, order.argsort()).view(tokens, count, x.shape[1])
        mixed: Tensor = (outputs * weights[..., None]).sum(1).to(x.dtype)
        return mixed
