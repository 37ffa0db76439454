from __future__ import annotations

import pytest
import torch
from prl.blocks.context import Context
from prl.blocks.moe import Experts, MixtureOfExperts, SoftmaxRouter
from torch import Tensor
from torch.nn import functional

HIDDEN, EXPERTS, PER_TOKEN, WIDTH = 16, 6, 3, 8


def mixture(*, renormalise: bool = True, seed: int = 0) -> MixtureOfExperts:
    mixer = MixtureOfExperts(
        SoftmaxRouter(hidden_size=HIDDEN, experts=EXPERTS, experts_per_token=PER_TOKEN, renormalise=renormalise),
        Experts(experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=WIDTH),
    )
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.4, generator=draw)
    return mixer


def definition(mixer: MixtureOfExperts, x: Tensor, *, renormalise: bool) -> Tensor:
    """One token and one expert at a time."""
    rows = []
    for token in x:
        probabilities = (mixer.gate.weight @ token).softmax(0)
        best = probabilities.topk(PER_TOKEN)
        total = best.values.sum() if renormalise else torch.ones(())
        row = torch.zeros(HIDDEN)
        for weight, expert in zip(best.values, best.indices.tolist(), strict=True):
            gate, up = (mixer.experts.gate_up_proj[expert] @ token).chunk(2)
            row = row + weight / total * (mixer.experts.down_proj[expert] @ (functional.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def apply(mixer: MixtureOfExperts, x: Tensor) -> Tensor:
    out: Tensor = mixer(x, Context.packed(torch.tensor([0, len(x)])), 0)
    return out


@pytest.mark.parametrize("renormalise", [True, False])
def test_each_token_gets_the_weighted_sum_of_its_experts(renormalise: bool) -> None:
    mixer = mixture(renormalise=renormalise)
    x = torch.randn(11, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out, expected = apply(mixer, x), definition(mixer, x, renormalise=renormalise)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    inputs = [x, *mixer.parameters()]
    own, plain = (torch.autograd.grad(o, inputs, direction) for o in (out, expected))
    for a, b in zip(own, plain, strict=True):
        torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-5)


def test_an_expert_nobody_chooses_has_zero_gradient() -> None:
    mixer = mixture()
    with torch.no_grad():
        mixer.gate.weight.zero_()
        mixer.gate.weight[:PER_TOKEN] = 10.0
    apply(mixer, torch.rand(4, HIDDEN) + 0.1).sum().backward()
    gradient = mixer.experts.down_proj.grad
    assert gradient is not None
    assert gradient[:PER_TOKEN].abs().amin((1, 2)).gt(0).any()
    assert torch.equal(gradient[PER_TOKEN:], torch.zeros_like(gradient[PER_TOKEN:]))


def test_no_tokens() -> None:
    mixer = mixture()
    out = apply(mixer, torch.zeros(0, HIDDEN))
    assert out.shape == (0, HIDDEN)
    out.sum().backward()
    assert mixer.experts.gate_up_proj.grad is not None


def test_the_router_works_in_float32() -> None:
    """In bfloat16 the logits 1 and 1 + 2^-9 would be equal, and the first expert would be chosen."""
    router = SoftmaxRouter(hidden_size=2, experts=2, experts_per_token=1, renormalise=False).bfloat16()
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 2**-9]]))
    weights, chosen = router(torch.ones(1, 2).bfloat16())
    assert weights.dtype is torch.float32
    assert chosen.tolist() == [[1]]


def test_tokens_do_not_depend_on_their_batch() -> None:
    mixer = mixture()
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(3))
    together = apply(mixer, x)
    torch.testing.assert_close(together, torch.cat([apply(mixer, row[None]) for row in x]), atol=1e-6, rtol=1e-6)
