from __future__ import annotations

import pytest
import torch
from prl.blocks.context import Context
from prl.blocks.decoder import initialise
from prl.blocks.mamba2 import Mamba2, MambaSizes, ssd_scan
from torch import Tensor
from torch.nn import functional

HIDDEN = 16
SIZES = MambaSizes(heads=4, head_dim=6, groups=2, state=5, kernel=4, chunk=8)


def mixer(*, chunk: int = 8, seed: int = 0) -> Mamba2:
    sizes = MambaSizes(heads=4, head_dim=6, groups=2, state=5, kernel=4, chunk=chunk)
    made = Mamba2(sizes, hidden_size=HIDDEN, norm_eps=1e-5)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.4, generator=draw)
    return made


def inputs(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def packed(*lengths: int) -> Context:
    return Context.packed(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]))


def definition(layer: Mamba2, x: Tensor) -> Tensor:
    """One document, one token after the other, one head at a time."""
    s = layer.sizes
    past, state, rows = [torch.zeros(s.convolved)] * s.kernel, torch.zeros(s.heads, s.head_dim, s.state), []
    for token in x:
        gate, new, dt = (layer.in_proj.weight @ token).split((s.inner, s.convolved, s.heads))
        past = [*past[1:], new]
        taps = layer.conv1d.weight[:, 0].unbind(1)
        convolved = functional.silu(layer.conv1d.bias + sum(w * u for w, u in zip(taps, past, strict=True)))
        u, b, c = convolved.split((s.inner, s.groups * s.state, s.groups * s.state))
        u, b, c = u.view(s.heads, -1), b.view(s.groups, -1), c.view(s.groups, -1)
        steps, heads, states = functional.softplus(dt + layer.dt_bias), [], []
        for h in range(s.heads):
            group = h * s.groups // s.heads
            decayed = torch.exp(-torch.exp(layer.A_log[h]) * steps[h]) * state[h]
            states.append(decayed + steps[h] * torch.outer(u[h], b[group]))
            heads.append(states[h] @ c[group] + layer.D[h] * u[h])
        state = torch.stack(states)
        gated = (torch.cat(heads) * functional.silu(gate)).view(s.groups, -1)
        normed = gated * torch.rsqrt(gated.square().mean(1, keepdim=True) + 1e-5)
        rows.append(layer.out_proj.weight @ (normed.flatten() * layer.norm.weight))
    return torch.stack(rows)


@pytest.mark.parametrize("length", [1, 8, 21])
def test_outputs_and_gradients_by_definition(length: int) -> None:
    layer, x = mixer(), inputs(length).requires_grad_()
    out, expected = layer(x, packed(length), 0), definition(layer, x)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    direction = inputs(length, seed=2)
    learning = [x, *layer.parameters()]
    own, plain = (torch.autograd.grad(o, learning, direction) for o in (out, expected))
    for a, b in zip(own, plain, strict=True):
        torch.testing.assert_close(a, b, atol=3e-5, rtol=1e-4)


@torch.inference_mode()
def test_the_chunk_changes_no_result() -> None:
    whole = mixer(chunk=64)(inputs(50), packed(50), 0)
    for chunk in (1, 7, 16):
        torch.testing.assert_close(mixer(chunk=chunk)(inputs(50), packed(50), 0), whole, atol=5e-6, rtol=0)


@torch.inference_mode()
def test_documents_do_not_see_each_other() -> None:
    layer, x = mixer(), inputs(41)
    lengths = [4, 19, 1, 17]
    alone = torch.cat([layer(part, packed(len(part)), 0) for part in x.split(lengths)])
    torch.testing.assert_close(layer(x, packed(*lengths), 0), alone, atol=5e-6, rtol=0)


def test_a_token_without_time_changes_nothing() -> None:
    draw = torch.Generator().manual_seed(0)
    x, b, c = (torch.randn(1, 9, n, 3, generator=draw) for n in (4, 2, 2))
    dt = torch.rand(1, 9, 4, generator=draw)
    decay = -torch.rand(4, generator=draw)
    _, state = ssd_scan(x[:, :6], dt[:, :6], decay, b[:, :6], c[:, :6], chunk=4)
    dt[:, 6:] = 0
    _, padded = ssd_scan(x, dt, decay, b, c, chunk=4)
    torch.testing.assert_close(padded, state)


def test_a_scan_goes_on_from_a_state() -> None:
    draw = torch.Generator().manual_seed(0)
    x, b, c = (torch.randn(2, 20, n, 3, generator=draw) for n in (4, 2, 2))
    dt, decay = torch.rand(2, 20, 4, generator=draw), -torch.rand(4, generator=draw)
    whole, end = ssd_scan(x, dt, decay, b, c, chunk=8)
    _, middle = ssd_scan(x[:, :9], dt[:, :9], decay, b[:, :9], c[:, :9], chunk=8)
    rest, again = ssd_scan(x[:, 9:], dt[:, 9:], decay, b[:, 9:], c[:, 9:], chunk=8, state=middle)
    torch.testing.assert_close(rest, whole[:, 9:], atol=5e-6, rtol=0)
    torch.testing.assert_close(again, end, atol=5e-6, rtol=0)


@torch.inference_mode()
def test_many_rows_step_by_step() -> None:
    """Ragged prompts, chunks that skip a row, single tokens, a row copied whole and a row begun anew."""
    layer = mixer()
    texts = [inputs(24, seed=seed) for seed in range(3)]
    whole = [layer(text, packed(24), 0) for text in texts]
    cache = layer.new_cache(rows=5, length=0)
    past = [0, 0, 0]
    for lengths in [(6, 2, 1), (1, 1, 1), (1, 1, 1), (3, 0, 9), (1, 1, 1)]:
        context = Context.cached([cache], lengths=lengths, rows=slice(1, 4), past=past)
        new = torch.cat([t[p : p + n] for t, p, n in zip(texts, past, lengths, strict=True)])
        wanted = torch.cat([w[p : p + n] for w, p, n in zip(whole, past, lengths, strict=True)])
        torch.testing.assert_close(layer(new, context, 0), wanted, atol=1e-5, rtol=0)
        past = [p + n for p, n in zip(past, lengths, strict=True)]
    cache.copy_row(1, 0, past[0])
    rows, first = torch.tensor([0, 2]), (past[0], 0)
    mixed = Context.cached([cache], lengths=(2, 5), rows=rows, past=first)
    new = torch.cat((texts[0][first[0] : first[0] + 2], texts[1][:5]))
    wanted = torch.cat((whole[0][first[0] : first[0] + 2], whole[1][:5]))
    torch.testing.assert_close(layer(new, mixed, 0), wanted, atol=1e-5, rtol=0)


def test_the_state_is_float32_in_every_format() -> None:
    cache = mixer().bfloat16().new_cache(rows=2, length=8)
    assert cache.inputs.dtype is torch.bfloat16
    assert cache.state.dtype is torch.float32
    assert cache.state.shape == (2, 4, 6, 5)
    assert not cache.prefix_reusable


def test_fresh_weights_remember_from_ten_to_a_thousand_tokens() -> None:
    layer = Mamba2(SIZES, hidden_size=HIDDEN, norm_eps=1e-5)
    torch.manual_seed(0)
    initialise(layer)
    steps = functional.softplus(layer.dt_bias)
    assert 1e-3 <= steps.min() < steps.max() <= 0.1 + 1e-6
    torch.testing.assert_close(layer.A_log.exp(), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert torch.equal(layer.D, torch.ones(4))
    assert layer.conv1d.weight.abs().max() <= 0.5
    assert torch.isfinite(layer(inputs(9), packed(9), 0)).all()
