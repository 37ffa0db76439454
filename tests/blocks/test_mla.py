from __future__ import annotations

import math

import pytest
import torch
from prl.blocks.context import Context
from prl.blocks.mla import LatentHeads, MultiHeadLatentAttention
from prl.blocks.rope import RotaryEmbedding, Yarn
from torch import Tensor

HIDDEN, EPS = 32, 1e-5
SIZES = LatentHeads(heads=3, q_rank=20, kv_rank=12, nope_dim=10, rope_dim=4, value_dim=8)
YARN = Yarn(factor=8.0, original_length=16)


def mixer(sizes: LatentHeads = SIZES, *, yarn: Yarn | None = YARN, seed: int = 0) -> MultiHeadLatentAttention:
    rope = RotaryEmbedding(sizes.rope_dim, 100.0, interleaved=True, yarn=yarn)
    made = MultiHeadLatentAttention(sizes, hidden_size=HIDDEN, rope=rope, norm_eps=EPS)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3, generator=draw)
    return made


def inputs(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def packed(*lengths: int) -> Context:
    return Context.packed(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]))


def definition(layer: MultiHeadLatentAttention, x: Tensor) -> Tensor:
    """One document: one query, one head at a time, with rotations as complex numbers."""
    sizes = layer.sizes
    frequencies = 100.0 ** (-2 * torch.arange(sizes.rope_dim // 2) / sizes.rope_dim)
    if layer.rope.yarn is not None:
        frequencies = layer.rope.yarn.stretched(frequencies, 100.0)

    def norm(latent: Tensor, weight: Tensor) -> Tensor:
        return latent * torch.rsqrt(latent.square().mean() + EPS) * weight

    def turned(vector: Tensor, position: int) -> Tensor:
        plane = torch.view_as_complex(vector.reshape(-1, 2)) * torch.exp(1j * position * frequencies)
        return torch.view_as_real(plane).flatten()

    queries, keys, values = [], [], []
    for position, token in enumerate(x):
        q, c, k_rope = (layer.qkv_a_proj.weight @ token).split((sizes.q_rank, sizes.kv_rank, sizes.rope_dim))
        q = (layer.q_b_proj.weight @ norm(q, layer.q_a_layernorm.weight)).view(sizes.heads, -1)
        kv = (layer.kv_b_proj.weight @ norm(c, layer.kv_a_layernorm.weight)).view(sizes.heads, -1)
        n = sizes.nope_dim
        queries.append([torch.cat((head[:n], turned(head[n:], position))) for head in q])
        keys.append([torch.cat((head[:n], turned(k_rope, position))) for head in kv])
        values.append([head[n:] for head in kv])
    scale = 1 / math.sqrt(sizes.qk_dim) * (1.0 if layer.rope.yarn is None else (0.1 * math.log(8.0) + 1) ** 2)
    rows = []
    for position, heads in enumerate(queries):
        mixed = []
        for h, query in enumerate(heads):
            scores = torch.stack([query @ keys[earlier][h] for earlier in range(position + 1)]) * scale
            mixed.append(scores.softmax(0) @ torch.stack([values[e][h] for e in range(position + 1)]))
        rows.append(layer.o_proj.weight @ torch.cat(mixed))
    return torch.stack(rows)


@pytest.mark.parametrize("yarn", [None, YARN])
@pytest.mark.parametrize("value_dim", [8, 14])
def test_outputs_and_gradients_by_definition(yarn: Yarn | None, value_dim: int) -> None:
    sizes = LatentHeads(heads=3, q_rank=20, kv_rank=12, nope_dim=10, rope_dim=4, value_dim=value_dim)
    layer, x = mixer(sizes, yarn=yarn), inputs(13).requires_grad_()
    out, expected = layer(x, packed(13), 0), definition(layer, x)
    torch.testing.assert_close(out, expected, atol=5e-6, rtol=1e-5)
    direction = inputs(13, seed=2)
    learning = [x, *layer.parameters()]
    own, plain = (torch.autograd.grad(o, learning, direction) for o in (out, expected))
    for a, b in zip(own, plain, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_absorbed_equals_expanded() -> None:
    layer, context = mixer(), packed(9, 21, 1)
    draw = torch.Generator().manual_seed(3)
    q_nope = torch.randn(31, SIZES.heads, SIZES.nope_dim, generator=draw)
    q_rope = torch.randn(31, SIZES.heads, SIZES.rope_dim, generator=draw)
    latent = torch.randn(31, SIZES.kv_rank + SIZES.rope_dim, generator=draw)
    with torch.no_grad():
        expanded = layer.expanded(q_nope, q_rope, latent, context)
        absorbed = layer.absorbed(q_nope, q_rope, latent, context, selection=None)
    assert expanded.shape == (31, SIZES.heads, SIZES.value_dim)
    torch.testing.assert_close(absorbed, expanded, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_documents_do_not_see_each_other() -> None:
    layer, x = mixer(), inputs(30)
    alone = torch.cat([layer(part, packed(len(part)), 0) for part in x.split([4, 19, 7])])
    torch.testing.assert_close(layer(x, packed(4, 19, 7), 0), alone, atol=2e-6, rtol=0)


@torch.inference_mode()
def test_the_cache_holds_the_latents_and_the_shared_key() -> None:
    layer, x = mixer(), inputs(10)
    cache = layer.new_cache(rows=3, length=16)
    assert cache.latents.stored.shape == (1, 3, 1, 16, SIZES.kv_rank + SIZES.rope_dim)
    assert cache.index is None
    whole = layer(x, packed(10), 0)
    start = Context.cached([cache], lengths=(6,), rows=torch.tensor([2]), past=(0,))
    torch.testing.assert_close(layer(x[:6], start, 0), whole[:6], atol=1e-5, rtol=0)
    cache.copy_row(2, 0, 4)
    for row, past in ((2, 6), (0, 4)):
        rest = Context.cached([cache], lengths=(10 - past,), rows=torch.tensor([row]), past=(past,))
        torch.testing.assert_close(layer(x[past:], rest, 0), whole[past:], atol=1e-5, rtol=0)


def test_caches_follow_the_weights() -> None:
    cache = mixer().bfloat16().new_cache(rows=1, length=4)
    assert cache.latents.stored.dtype is torch.bfloat16
