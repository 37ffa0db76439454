from __future__ import annotations

import torch
from prl.blocks.context import Context
from prl.blocks.moe import Experts, MixtureOfExperts, SigmoidRouter, SoftmaxRouter
from prl.blocks.routing import Replay, RouteLog
from torch import Tensor

HIDDEN, EXPERTS, PER_TOKEN, LAYER = 16, 8, 3, 4
SIGMOID = SigmoidRouter(hidden_size=HIDDEN, experts=EXPERTS, experts_per_token=PER_TOKEN, scale=2.5)
SOFTMAX = SoftmaxRouter(hidden_size=HIDDEN, experts=EXPERTS, experts_per_token=PER_TOKEN, renormalise=True)
X = torch.randn(10, HIDDEN, generator=torch.Generator().manual_seed(1))


def mixture(router: SigmoidRouter | SoftmaxRouter = SIGMOID) -> MixtureOfExperts:
    mixer = MixtureOfExperts(router, Experts(experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=8))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.4, generator=draw)
    return mixer


def run(mixer: MixtureOfExperts, routes: RouteLog | None, x: Tensor = X) -> Tensor:
    context = Context.packed(torch.tensor([0, 4, len(x)]))
    context.routes = routes
    out: Tensor = mixer(x, context, LAYER)
    return out


def recorded(mixer: MixtureOfExperts) -> Tensor:
    log = RouteLog(chosen={})
    run(mixer, log)
    assert log.chosen is not None
    return log.chosen[LAYER]


def replay(experts: Tensor, known: Tensor | None = None, *, count: int = EXPERTS) -> Replay:
    """One layer, between two that the model lacks."""
    rows = experts.to(torch.uint8)
    three = torch.stack([rows.flip(1), rows, rows], 1)
    known = torch.ones(len(rows), dtype=torch.bool) if known is None else known
    return Replay.of(three, known, layers=(1, LAYER, 7), count=count)


def test_replaying_the_own_choice_changes_no_bit_forward_or_backward() -> None:
    for router in (SIGMOID, SOFTMAX):
        mixer = mixture(router)
        own = recorded(mixer)
        shuffled = own.flip(1)  # an engine may name the same experts in another order
        direction = torch.randn(X.shape, generator=torch.Generator().manual_seed(2))
        parameters = list(mixer.parameters())
        plain = run(mixer, None)
        log = RouteLog(replay=replay(shuffled))
        replayed = run(mixer, log)
        assert torch.equal(replayed, plain)
        assert not log.differing[LAYER].any()
        expected, seen = (torch.autograd.grad(out, parameters, direction) for out in (plain, replayed))
        assert all(torch.equal(a, b) for a, b in zip(expected, seen, strict=True))


def test_other_experts_are_followed_and_weighed_by_the_own_gate() -> None:
    mixer = mixture()
    own = recorded(mixer)
    others = torch.stack(
        [torch.tensor([e for e in range(EXPERTS) if e not in row][:PER_TOKEN]) for row in own.tolist()]
    )
    log = RouteLog(replay=replay(others))
    out = run(mixer, log)
    scores = (X @ mixer.gate.weight.T).sigmoid().gather(1, others)
    weights = scores / scores.sum(1, keepdim=True) * 2.5
    torch.testing.assert_close(out, mixer.routed(X, weights, others))
    assert log.differing[LAYER].all()
    (gradient,) = torch.autograd.grad(out.square().sum(), [mixer.gate.weight])
    touched = {int(expert) for expert in others.unique()}
    assert {int(e) for e in gradient.abs().sum(1).nonzero()} == touched


def test_a_token_without_a_route_follows_its_own_router() -> None:
    mixer = mixture()
    own = recorded(mixer)
    others = (own + 1) % EXPERTS
    known = torch.arange(len(X)) % 2 == 0
    log = RouteLog(replay=replay(others, known))
    out, plain, all_replayed = run(mixer, log), run(mixer, None), run(mixer, RouteLog(replay=replay(others)))
    torch.testing.assert_close(out[~known], plain[~known])
    torch.testing.assert_close(out[known], all_replayed[known])
    assert torch.equal(log.differing[LAYER], known)


def test_what_is_no_choice_is_not_known() -> None:
    sound = torch.tensor([[0, 1, 2], [7, 3, 5]])
    twice, beyond = torch.tensor([[4, 1, 4]]), torch.tensor([[0, 1, 6]])
    assert replay(torch.cat((sound, twice))).known.tolist() == [True, True, False]
    assert replay(torch.cat((sound[:1], beyond)), count=6).known.tolist() == [True, False]
    negative = Replay.of(
        torch.tensor([[[-1, 2]], [[300, 2]]], dtype=torch.int16), torch.ones(2) > 0, layers=(0,), count=384
    )
    assert negative.known.tolist() == [False, True]


def test_layers_are_found_by_their_index() -> None:
    mixer = mixture()
    own = recorded(mixer)
    elsewhere = Replay.of(
        own[:, None].flip(2).to(torch.uint8), torch.ones(len(X)) > 0, layers=(LAYER + 1,), count=EXPERTS
    )
    log = RouteLog(replay=elsewhere)
    assert torch.equal(run(mixer, log), run(mixer, None))
    assert log.differing == {}
