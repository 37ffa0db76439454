"""Every way of computing attention against the definition, one sequence and one head at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prl.blocks import padding
from prl.blocks.attend import attend
from prl.blocks.cache import KeyValueCache
from prl.blocks.context import Context
from prl.blocks.rope import RotaryEmbedding, rotate
from torch import Tensor

CPU = torch.device("cpu")
HEADS, GROUPS, SIZE, SCALE = 4, 2, 8, 0.3
LENGTHS = [(5,), (4, 4, 4), (9, 1, 3, 8, 2), (40, 2, 39, 3), (3, 0, 5)]


def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v over one causal sequence: q [n, H, D] are the last n of the k, v [m, G, D]."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k) * SCALE
    hidden = torch.ones(len(q), len(k)).tril(len(k) - len(q)) == 0
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def projections(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, heads, SIZE, generator=draw) for heads in (HEADS, GROUPS, GROUPS))  # type: ignore[return-value]


def packed(lengths: tuple[int, ...]) -> Context:
    return Context.packed(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]))


def new_cache(rows: int, length: int = 64) -> KeyValueCache:
    return KeyValueCache(rows=rows, length=length, kv_heads=GROUPS, head_dim=SIZE, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_sequences_do_not_see_each_other(lengths: tuple[int, ...]) -> None:
    inputs = [t.requires_grad_() for t in projections(sum(lengths))]
    out = attend(*inputs, packed(lengths), scale=SCALE)
    expected = torch.cat([definition(*parts) for parts in zip(*(t.split(lengths) for t in inputs), strict=True)])
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    own, plain = (torch.autograd.grad(o, inputs, direction) for o in (out, expected))
    for a, b in zip(own, plain, strict=True):
        torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-5)


def test_no_tokens_at_all() -> None:
    q, k, v = projections(0)
    assert attend(q, k, v, packed(()), scale=SCALE).shape == (0, HEADS, SIZE)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=30).filter(any))
@settings(max_examples=60, deadline=None)
def test_padding_is_exact_and_bounded(lengths: list[int]) -> None:
    layout = padding.bucketed(lengths, CPU)
    tokens = torch.arange(sum(lengths))
    rectangles = list(layout.pad(tokens))
    assert layout.unpad(rectangles).tolist() == tokens.tolist()
    assert sum(rectangle.numel() for rectangle in rectangles) <= 1.5 * len(tokens)
    (square,) = padding.square(lengths, CPU).pad(tokens)
    assert square.shape == (len(lengths), max(lengths))
    firsts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    for row, first, n in zip(square, firsts.tolist(), lengths, strict=True):
        assert row[:n].tolist() == list(range(first, first + n))


def test_equal_lengths_are_not_copied() -> None:
    tokens = torch.arange(12)
    (rectangle,) = padding.bucketed((4, 4, 4), CPU).pad(tokens)
    assert rectangle.data_ptr() == tokens.data_ptr()


# --- caches -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scattered", [False, True])
def test_chunks_through_a_cache_equal_the_whole(scattered: bool) -> None:
    """Prompts, then ragged continuations, then single tokens, then continuations again."""
    chunks = [(7, 3, 5), (2, 6, 1), (1, 1, 1), (1, 1, 1), (3, 0, 2)]
    totals = tuple(sum(column) for column in zip(*chunks, strict=True))
    whole = [t.split(totals) for t in projections(sum(totals), seed=1)]
    expected = [definition(*parts) for parts in zip(*whole, strict=True)]
    cache = new_cache(rows=6)
    rows = torch.tensor([4, 0, 2]) if scattered else slice(2, 5)
    past = [0, 0, 0]
    for lengths in chunks:
        context = Context.cached([cache], lengths=lengths, rows=rows, past=past)
        spans = [slice(p, p + n) for p, n in zip(past, lengths, strict=True)]
        q, k, v = (torch.cat([s[span] for s, span in zip(t, spans, strict=True)]) for t in whole)
        out = attend(q, k, v, context, scale=SCALE, cache=cache)
        torch.testing.assert_close(
            out, torch.cat([e[span] for e, span in zip(expected, spans, strict=True)]), atol=2e-6, rtol=1e-5
        )
        past = [p + n for p, n in zip(past, lengths, strict=True)]


def test_decoding_without_a_mask_equals_decoding_with_one() -> None:
    """Rows that happen to have equal pasts take the path without a mask."""
    q, k, v = projections(8, seed=2)
    cache = new_cache(rows=2)
    prompt = Context.cached([cache], lengths=(3, 3), rows=slice(0, 2), past=(0, 0))
    attend(q[:6], k[:6], v[:6], prompt, scale=SCALE, cache=cache)
    context = Context.cached([cache], lengths=(1, 1), rows=slice(0, 2), past=(3, 3))
    out = attend(q[6:], k[6:], v[6:], context, scale=SCALE, cache=cache)
    expected = [definition(q[6 + i : 7 + i], torch.cat((k[s], k[6 + i : 7 + i])), torch.cat((v[s], v[6 + i : 7 + i])))
                for i, s in enumerate((slice(0, 3), slice(3, 6)))]  # fmt: skip
    torch.testing.assert_close(out, torch.cat(expected), atol=2e-6, rtol=1e-5)


def test_a_row_read_by_slice_is_a_view() -> None:
    cache = new_cache(rows=4)
    k, v = cache.read(Context.cached([cache], lengths=(1, 1), rows=slice(1, 3), past=(3, 5)))
    assert k.shape == (2, GROUPS, 6, SIZE)
    assert k.data_ptr() == cache.k[1].data_ptr()
    assert v.data_ptr() == cache.v[1].data_ptr()


def test_copy_row_copies_the_first_tokens_only() -> None:
    cache = new_cache(rows=3, length=4)
    cache.k.copy_(torch.arange(cache.k.numel()).view_as(cache.k))
    cache.v.copy_(-cache.k)
    before = cache.k[2].clone()
    cache.copy_row(0, 2, 3)
    assert torch.equal(cache.k[2, :, :3], cache.k[0, :, :3])
    assert torch.equal(cache.v[2, :, :3], cache.v[0, :, :3])
    assert torch.equal(cache.k[2, :, 3:], before[:, 3:])


def test_what_a_previous_sequence_left_in_a_row_is_not_seen() -> None:
    q, k, v = projections(6, seed=4)
    clean, used = new_cache(rows=2), new_cache(rows=2)
    used.k.fill_(1e6)
    used.v.fill_(1e6)
    for lengths, past, span in (((3, 1), (0, 0), slice(0, 4)), ((1, 1), (3, 1), slice(4, 6))):
        outs = []
        for cache in (clean, used):
            context = Context.cached([cache], lengths=lengths, rows=slice(0, 2), past=past)
            outs.append(attend(q[span], k[span], v[span], context, scale=SCALE, cache=cache))
        assert torch.equal(*outs)


# --- rotary positions -------------------------------------------------------------------------------------------------
def test_rotation_turns_pairs_by_position_times_frequency() -> None:
    context = Context.cached([], lengths=[2], rows=slice(0, 1), past=[300])
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    out = rotate(x, RotaryEmbedding(8, 100.0).tables(context, torch.float32))
    angles = torch.tensor([300.0, 301.0])[:, None, None] * 100.0 ** (-torch.arange(4) / 4)
    turned = torch.view_as_complex(torch.stack((x[..., :4], x[..., 4:]), -1)) * torch.polar(torch.ones(2, 1, 4), angles)
    torch.testing.assert_close(out, torch.cat((turned.real, turned.imag), -1), atol=1e-4, rtol=1e-4)


def test_tables_are_made_once_for_all_layers_and_grow() -> None:
    rope = RotaryEmbedding(8, 100.0)
    context = packed((4,))
    assert rope.tables(context, torch.float32) is rope.tables(context, torch.float32)
    far = Context.cached([], lengths=[1], rows=slice(0, 1), past=[5000])
    expected = RotaryEmbedding(8, 100.0).tables(far, torch.float32)
    assert torch.equal(rope.tables(far, torch.float32).cos, expected.cos)
