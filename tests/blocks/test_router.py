from __future__ import annotations

import pytest
import torch
from prl.blocks.context import Context
from prl.blocks.mlp import GatedMLP, SquaredReluMLP
from prl.blocks.moe import (
    Experts,
    LatentMixtureOfExperts,
    MixtureOfExperts,
    SigmoidRouter,
    SquaredReluExperts,
)
from torch import Tensor, nn
from torch.nn import functional

HIDDEN, EXPERTS, PER_TOKEN, WIDTH, LATENT = 16, 8, 3, 8, 12


def router(
    *, groups: int = 1, groups_per_token: int = 1, renormalise: bool = True, scale: float = 2.5
) -> SigmoidRouter:
    return SigmoidRouter(
        hidden_size=HIDDEN,
        experts=EXPERTS,
        experts_per_token=PER_TOKEN,
        scale=scale,
        renormalise=renormalise,
        groups=groups,
        groups_per_token=groups_per_token,
    )


def randomised(module: nn.Module, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.normal_(std=0.4, generator=draw)


def inputs(count: int) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(1))


def apply(mixer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = mixer(x, Context.packed(torch.tensor([0, len(x)])), 0)
    return out


@pytest.mark.parametrize("renormalise", [True, False])
def test_the_correction_chooses_and_the_sigmoid_weighs(renormalise: bool) -> None:
    gate = router(renormalise=renormalise)
    randomised(gate)
    weights, chosen = gate(inputs(20))
    for token, own_weights, own in zip(inputs(20), weights, chosen, strict=True):
        scores = (gate.weight @ token).sigmoid()
        best = (scores + gate.e_score_correction_bias).topk(PER_TOKEN).indices
        assert set(own.tolist()) == set(best.tolist())
        expected = scores[own] / (scores[own].sum() if renormalise else 1.0) * 2.5
        torch.testing.assert_close(own_weights, expected)
    assert weights.grad_fn is not None
    assert not gate.e_score_correction_bias.requires_grad


def test_the_correction_alone_can_decide() -> None:
    gate = router()
    randomised(gate)
    gate.e_score_correction_bias.zero_()[[1, 4, 6]] = 5.0
    assert all(set(own.tolist()) == {1, 4, 6} for own in gate(inputs(9))[1])


def test_only_experts_of_the_best_groups() -> None:
    gate = router(groups=4, groups_per_token=2)
    randomised(gate)
    for token, own in zip(inputs(30), gate(inputs(30))[1], strict=True):
        choice = (gate.weight.detach() @ token).sigmoid() + gate.e_score_correction_bias
        groups = choice.view(4, 2).sum(1).topk(2).indices.tolist()
        allowed = [expert for expert in range(EXPERTS) if expert // 2 in groups]
        best = sorted(allowed, key=lambda expert: -float(choice[expert]))[:PER_TOKEN]
        assert set(own.tolist()) == set(best)


def test_the_router_works_in_float32() -> None:
    """In bfloat16 the logits 1 and 1 + 2^-9 would be equal, and the first expert would be chosen."""
    gate = SigmoidRouter(hidden_size=2, experts=2, experts_per_token=1, scale=1.0).bfloat16()
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 2**-9]]))
    weights, chosen = gate(torch.ones(1, 2).bfloat16())
    assert weights.dtype is torch.float32
    assert chosen.tolist() == [[1]]


def test_the_shared_expert_sees_every_token() -> None:
    shared = GatedMLP(HIDDEN, WIDTH)
    experts = Experts(experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=WIDTH)
    mixer, alone = MixtureOfExperts(router(), experts, shared=shared), MixtureOfExperts(router(), experts)
    randomised(mixer)
    alone.gate.load_state_dict(mixer.gate.state_dict())
    x = inputs(7)
    torch.testing.assert_close(apply(mixer, x), apply(alone, x) + apply(shared, x))


def test_latent_experts_by_definition() -> None:
    """One token and one expert at a time; weights and scale are applied once, in the latent."""
    mixer = LatentMixtureOfExperts(
        router(),
        SquaredReluExperts(experts=EXPERTS, hidden_size=LATENT, intermediate_size=WIDTH),
        hidden_size=HIDDEN,
        latent_size=LATENT,
        shared=SquaredReluMLP(HIDDEN, WIDTH),
    )
    randomised(mixer)
    x = inputs(11).requires_grad_()
    weights, chosen = mixer.gate(x)
    rows = []
    for token, own_weights, own in zip(x, weights, chosen, strict=True):
        latent = mixer.fc1_latent_proj.weight @ token
        mixed = torch.zeros(LATENT)
        for weight, expert in zip(own_weights, own.tolist(), strict=True):
            hidden = functional.relu(mixer.experts.up_proj[expert] @ latent) ** 2
            mixed = mixed + weight * (mixer.experts.down_proj[expert] @ hidden)
        shared = mixer.shared_experts
        rows.append(
            mixer.fc2_latent_proj.weight @ mixed
            + shared.down_proj.weight @ functional.relu(shared.up_proj.weight @ token) ** 2
        )
    out, expected = apply(mixer, x), torch.stack(rows)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    learning = [x, *mixer.parameters()]
    own_gradients, plain = (torch.autograd.grad(o, learning, direction, retain_graph=True) for o in (out, expected))
    for own_gradient, gradient in zip(own_gradients, plain, strict=True):
        torch.testing.assert_close(own_gradient, gradient, atol=2e-5, rtol=1e-4)


def test_no_tokens() -> None:
    experts = SquaredReluExperts(experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=WIDTH)
    mixer = MixtureOfExperts(router(), experts)
    randomised(mixer)
    out = apply(mixer, torch.zeros(0, HIDDEN))
    assert out.shape == (0, HIDDEN)
    out.sum().backward()
    assert experts.up_proj.grad is not None
