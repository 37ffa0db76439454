"""Sparse mixture of experts: a router sends every token to its best experts, whose outputs are summed by weight.

Tokens are sorted by expert and each expert multiplies its own block (grouped products): no capacity, no dropped tokens,
no loop over experts, and the same result for the same tokens on every run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional

from prl.blocks.context import Context
from prl.blocks.kernels import seam
from prl.blocks.linear import Linear
from prl.blocks.mlp import swiglu
from prl.blocks.rounding import Rounds

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Follow: TypeAlias = "Callable[[Tensor], Tensor]"
"""A router's choice [T, K] -> the choice that is followed [T, K] (see `prl.blocks.routing`)."""


@seam
def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x [N, I] sorted by expert, weight [E, O, I], offsets [E] int32 end of each expert's rows -> x weight.T [N, O]"""
    return functional.grouped_mm(x, weight.transpose(1, 2), offs=offsets)


def reorder(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """x [N, D], a permutation [N] int64 and its inverse -> x[order]."""
    reordered: Tensor = _Reorder.apply(x, order, inverse)  # type: ignore[no-untyped-call]
    return reordered


class _Reorder(torch.autograd.Function):
    """Its gradients are gathered too. Those of torch's indexing are added by atomic operations, for it may repeat rows:
    several times slower."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class RunExperts(Protocol):
    """Runs all experts of a layer on tokens that are sorted by expert. Expert parallelism puts another in the place of
    `HERE`."""

    @property
    def group(self) -> ProcessGroup | None:
        """Ranks that hold the experts, in order and equally many each; None: all of them are here."""

    def __call__(self, experts: nn.Module, x: Tensor, counts: Tensor) -> Tensor:
        """x [N, D], counts [E] int64 of each expert, wherever it is -> their outputs [N, D]."""


@attrs.frozen(eq=False)
class RunHere:
    """All experts are here."""

    group: None = None

    def __call__(self, experts: nn.Module, x: Tensor, counts: Tensor) -> Tensor:
        """x [N, D] sorted by expert, counts [E] of each -> [N, D]."""
        outputs: Tensor = experts(x, counts.cumsum(0).int())
        return outputs


HERE = RunHere()


@seam
def dispatch(x: Tensor, weights: Tensor, chosen: Tensor, experts: nn.Module, run: RunExperts, count: int) -> Tensor:
    """x [T, D], weights and chosen experts [T, K] -> the weighted sum of the chosen experts' outputs [T, D].

    `run` brings tokens sorted by expert to all `count` experts. `experts(x [N, D] sorted by expert, offsets int32, the
    end of each expert's rows) -> [N, D]` are those of this rank: a kernel that exchanges tokens with the ranks of
    `run.group` itself calls them, and needs no `run`.
    """
    tokens, choices = chosen.shape
    order = chosen.flatten().argsort(stable=True)
    # Of static shape, unlike torch.bincount: nothing waits for a device, and a compiler can follow.
    counts = torch.zeros(count, dtype=torch.int64, device=x.device)
    counts = counts.scatter_add(0, chosen.flatten(), torch.ones_like(chosen.flatten()))
    # Copies first, then a permutation: a gather with repeats would add gradients in no fixed order on a GPU.
    copies = x[:, None].expand(-1, choices, -1).flatten(0, 1)
    inverse = order.argsort()
    sorted_outputs = run(experts, reorder(copies, order, inverse), counts)
    outputs = reorder(sorted_outputs, inverse, order).view(tokens, choices, x.shape[1])
    return (outputs * weights[..., None]).sum(1).to(x.dtype)


class SoftmaxRouter(nn.Module):
    """Chooses by the softmax over all experts; weights may be renormalised over the chosen. Computed in float32."""

    def __init__(self, *, hidden_size: int, experts: int, experts_per_token: int, renormalise: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))
        self.experts_per_token = experts_per_token
        self.renormalise = renormalise

    def forward(self, x: Tensor, follow: Follow | None = None) -> tuple[Tensor, Tensor]:
        """x [T, hidden] -> weights [T, K] float32, chosen experts [T, K] int64: what `follow` makes of its choice."""
        probabilities = functional.linear(x.float(), self.weight.float()).softmax(-1)
        own = self.choose(probabilities)
        return self.weigh(probabilities, own if follow is None else follow(own))

    def choose(self, probabilities: Tensor) -> Tensor:
        """probabilities [T, E] -> the K most probable experts [T, K]."""
        return probabilities.detach().topk(self.experts_per_token, -1).indices

    def weigh(self, probabilities: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of chosen experts [T, K], through which the router learns; and the choice itself."""
        weights = probabilities.gather(1, chosen)
        return weights / weights.sum(-1, keepdim=True) if self.renormalise else weights, chosen


class SigmoidRouter(nn.Module):
    """Chooses by sigmoid plus a correction that balances load, and weighs by the sigmoid alone. Computed in float32.

    DeepSeek-V3's (DeepSeek-AI 2024, arXiv:2412.19437, section 2.1.2). The correction is a buffer that reinforcement
    learning leaves as it is. It must stay float32 on its way everywhere: trained ones share a large offset, in bfloat16
    most of their differences would be lost. With `groups`, only experts of the `groups_per_token` best groups (by the
    sum of their two best choices) can be chosen.
    """

    e_score_correction_bias: Tensor

    def __init__(
        self,
        *,
        hidden_size: int,
        experts: int,
        experts_per_token: int,
        scale: float,
        renormalise: bool = True,
        groups: int = 1,
        groups_per_token: int = 1,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts, dtype=torch.float32))
        self.experts_per_token = experts_per_token
        self.scale = scale
        self.renormalise = renormalise
        self.groups, self.groups_per_token = groups, groups_per_token

    def forward(self, x: Tensor, follow: Follow | None = None) -> tuple[Tensor, Tensor]:
        """x [T, hidden] -> weights [T, K] float32, chosen experts [T, K] int64: what `follow` makes of its choice."""
        scores = functional.linear(x.float(), self.weight.float()).sigmoid()
        own = self.choose(scores)
        return self.weigh(scores, own if follow is None else follow(own))

    def choose(self, scores: Tensor) -> Tensor:
        """scores [T, E] -> chosen experts [T, K]."""
        choice = scores.detach() + self.e_score_correction_bias.float()
        if self.groups > 1:
            choice = self._in_best_groups(choice)
        return choice.topk(self.experts_per_token, -1).indices

    def weigh(self, scores: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of chosen experts [T, K], through which the router learns; and the choice itself."""
        weights = scores.gather(1, chosen)
        if self.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.scale, chosen

    def _in_best_groups(self, choice: Tensor) -> Tensor:
        """choice [T, E] -> the same, -inf outside the best groups."""
        grouped = torch.unflatten(choice, 1, (self.groups, -1))
        best = grouped.topk(2, -1).values.sum(-1).topk(self.groups_per_token, -1).indices
        outside = torch.ones(grouped.shape[:2], dtype=torch.bool, device=choice.device).scatter_(1, best, False)
        return grouped.masked_fill(outside[..., None], float("-inf")).flatten(1)


class Experts(Rounds):
    """Gated feed-forward experts with stacked weights: gate_up_proj [E, 2 F, hidden], down_proj [E, hidden, F]."""

    def __init__(self, *, experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [N, hidden] sorted by expert, offsets [E] int32 end of each expert's block -> [N, hidden]."""
        gate_up = grouped_mm(x, self.as_served("gate_up_proj"), offsets)
        return grouped_mm(swiglu(gate_up), self.as_served("down_proj"), offsets)


class SquaredReluExperts(Rounds):
    """Experts without a gate: up_proj [E, F, hidden], down_proj [E, hidden, F]."""

    def __init__(self, *, experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(experts, intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [N, hidden] sorted by expert, offsets [E] int32 end of each expert's block -> [N, hidden]."""
        up = grouped_mm(x, self.as_served("up_proj"), offsets)
        return grouped_mm(up.relu().square(), self.as_served("down_proj"), offsets)


class MixtureOfExperts(nn.Module):
    """A mixer: router and experts, and optionally a shared expert (itself a mixer) that every token goes through."""

    kind: ClassVar[str] = "experts"
    shares_prefixes = True

    def __init__(
        self, router: SoftmaxRouter | SigmoidRouter, experts: nn.Module, *, shared: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.gate = router
        self.experts = experts
        self.shared_experts = shared
        self.run_experts: RunExperts = HERE

    def forward(self, x: Tensor, context: Context, layer_index: int) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        follow = None if context.routes is None else partial(context.routes.follow, layer_index)
        weights, chosen = self.gate(x, follow)
        mixed = self.routed(x, weights, chosen)
        return mixed if self.shared_experts is None else mixed + self.shared_experts(x, context, layer_index)

    def routed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """x [T, D], weights and chosen experts [T, K] -> the weighted sum of the chosen experts' outputs [T, D]."""
        return dispatch(x, weights, chosen, self.experts, self.run_experts, len(self.gate.weight))


class LatentMixtureOfExperts(MixtureOfExperts):
    """Experts work on a projection of the residual stream; router and shared expert see all of it.

    LatentMoE of Nemotron-3 (NVIDIA 2026): more experts for the same bytes moved between devices.
    """

    def __init__(
        self, router: SigmoidRouter, experts: nn.Module, *, hidden_size: int, latent_size: int, shared: nn.Module
    ) -> None:
        super().__init__(router, experts, shared=shared)
        self.fc1_latent_proj = Linear(hidden_size, latent_size)
        self.fc2_latent_proj = Linear(latent_size, hidden_size)

    def routed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden], through the latent."""
        projected: Tensor = self.fc2_latent_proj(super().routed(self.fc1_latent_proj(x), weights, chosen))
        return projected
