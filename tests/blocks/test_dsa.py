from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prl.blocks import selected
from prl.blocks.context import Context
from prl.blocks.dsa import Indexer, SharedIndex, index_scores, select_topk, sparse_attend
from prl.blocks.rope import RotaryEmbedding
from torch import Tensor

HIDDEN, RANK, TOP_K = 16, 12, 5
INF = float("inf")


def indexer(*, heads: int = 4, seed: int = 0) -> Indexer:
    rope = RotaryEmbedding(4, 100.0, interleaved=True)
    made = Indexer(hidden_size=HIDDEN, q_rank=RANK, heads=heads, head_dim=8, top_k=TOP_K, rope=rope)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.5, generator=draw)
    return made


def inputs(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, HIDDEN, generator=draw), torch.randn(count, RANK, generator=draw)


def packed(*lengths: int) -> Context:
    return Context.packed(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]))


def test_of_equal_scores_the_earliest_wins() -> None:
    scores = torch.tensor([0.0, 2.0, 0.0, 3.0, 0.0, 2.0])
    assert select_topk(scores, 4).tolist() == [3, 1, 5, 0]


def test_where_there_is_nothing_to_see_stands_minus_one() -> None:
    scores = torch.tensor([[1.0, -INF, -INF, -INF], [1.0, 2.0, -1.0, -INF]])
    selected = select_topk(scores, 3)
    assert selected.tolist() == [[0, -1, -1], [1, 0, 2]]


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=12), st.integers(1, 14), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_what_comes_after_changes_no_selection(scores: list[int], count: int, later: int) -> None:
    """A longer row whose further places cannot be seen selects the same, ties or not."""
    alone = torch.tensor(scores, dtype=torch.float32)
    longer = torch.cat((alone, torch.full((later,), -INF)))
    own = select_topk(alone, count).tolist()
    assert [place for place in select_topk(longer, count).tolist() if place >= 0] == own
    assert own == sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count]


def test_scores_by_definition() -> None:
    draw = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(1, 3, 2, 8, generator=draw), torch.randn(1, 5, 8, generator=draw)
    weights = torch.randn(1, 3, 2, generator=draw)
    scores = index_scores(queries, keys, weights)
    for query in range(3):
        for key in range(5):
            products = [float(queries[0, query, h] @ keys[0, key]) / 8**0.5 for h in range(2)]
            expected = sum(float(weights[0, query, h]) * max(products[h], 0.0) for h in range(2))
            assert float(scores[0, query, key]) == pytest.approx(expected, abs=1e-5)


def test_nothing_is_selected_while_everything_fits() -> None:
    layer = indexer()
    assert layer(*inputs(2 * TOP_K), packed(TOP_K, TOP_K), 0, None) is None
    selection = layer(*inputs(2 * TOP_K + 1), packed(TOP_K, TOP_K + 1), 0, None)
    assert selection is not None
    (places,) = selection
    assert places.shape[2] == TOP_K
    assert (places >= 0).sum(-1).max() == TOP_K


def test_every_token_sees_its_best_of_those_before_it() -> None:
    layer, (x, latent) = indexer(), inputs(17)
    ((places,),) = layer(x, latent, packed(17), 0, None)
    for position, row in enumerate(places.tolist()):
        seen = row[: min(position + 1, TOP_K)]
        assert seen == sorted(set(seen))
        assert 0 <= seen[0] <= seen[-1] <= position
        assert row[len(seen) :] == [-1] * (TOP_K - len(seen))


@pytest.mark.parametrize("each", [1, 7, 64])
def test_chunks_select_what_one_product_of_all_pairs_selects(each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token, exactly; ties among them, since with one head many scores are zero."""
    layer, (x, latent) = indexer(heads=1), inputs(61)
    context = packed(61)
    tables = layer.rope.tables(context, x.dtype)
    queries = layer._rotated(layer._queries(latent), tables)[None]
    keys = layer._rotated(layer.k_norm(layer.wk(x))[:, None], tables)[None, :, 0]
    scores = index_scores(queries, keys, layer.weights_proj(x).float()[None])[0]
    later = torch.ones(61, 61, dtype=torch.bool).triu(1)
    best = select_topk(scores.masked_fill(later, -INF), TOP_K)
    monkeypatch.setattr(selected, "_CHUNK", each * 61)
    ((places,),) = layer(x, latent, context, 0, None)
    for own, row in zip(places.tolist(), best.tolist(), strict=True):
        assert [place for place in own if place >= 0] == sorted(place for place in row if place >= 0)


def test_a_layer_that_is_computed_again_has_its_choice_still() -> None:
    layer, context = indexer(), packed(9)
    first = layer(*inputs(9), context, 3, None)
    assert layer(*inputs(9), context, 3, None) is first


def test_selection_does_not_depend_on_packing() -> None:
    """With one head most scores are exactly zero: `torch.topk` would choose by the layout of the row."""
    layer = indexer(heads=1)
    x, latent = inputs(64)
    lengths = (21, 43)
    together = layer(x, latent, packed(*lengths), 0, None)
    assert together is not None
    by_length = {places.shape[1]: places[0] for places in together}
    for part, part_latent in zip(x.split(lengths), latent.split(lengths), strict=True):
        ((alone,),) = layer(part, part_latent, packed(len(part)), 0, None)
        assert torch.equal(alone, by_length[len(part)])


def test_it_is_never_trained() -> None:
    layer, (x, latent) = indexer(), inputs(9)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    selection = layer(x.requires_grad_(), latent, packed(9), 0, None)
    assert selection is not None
    assert selection[0].grad_fn is None


@torch.inference_mode()
def test_the_cached_choice_is_the_whole_forward_pass_s() -> None:
    layer, (x, latent) = indexer(), inputs(12)
    ((whole,),) = layer(x, latent, packed(12), 0, None)
    cache = layer.new_cache(rows=2, length=16)
    assert cache is not None
    past = 0
    for count in (3, 1, 1, 4, 1, 2):
        context = Context.cached([None], lengths=(count,), rows=slice(1, 2), past=(past,))
        part = slice(past, past + count)
        selection = layer(x[part], latent[part], context, 0, cache)
        past += count
        if past <= TOP_K:
            assert selection is None
        else:
            assert torch.equal(selection[0][0], whole[part])


def test_short_caches_hold_no_index_keys() -> None:
    assert indexer().new_cache(rows=2, length=TOP_K) is None


def test_layers_without_an_indexer_share_the_choice() -> None:
    context = packed(9)
    selection = indexer()(*inputs(9), context, 0, None)
    assert SharedIndex(4)(*inputs(9, seed=5), context, 1, None) is selection


@pytest.mark.parametrize("same", [False, True], ids=["keys and values", "values are the keys"])
@pytest.mark.parametrize("each", [1, 200, 2**27])
def test_sparse_attention_by_definition(same: bool, each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selected, "_CHUNK", each)
    draw = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(9, heads, 8, generator=draw, requires_grad=True) for heads in (4, 2, 2))
    v = k if same else v
    context = packed(9)
    selection = indexer()(*inputs(9), context, 0, None)
    out = sparse_attend(q, k, v, context, scale=0.3, selection=selection)
    rows = []
    for token in range(9):
        places = selection[0][0, token].long()
        seen = places[places >= 0]
        for head in range(4):
            weights = (k[seen, head // 2] @ q[token, head] * 0.3).softmax(0)
            rows.append(weights @ v[seen, head // 2])
    expected = torch.stack(rows).view(9, 4, 8)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    sources = (q, k) if same else (q, k, v)
    own, plain = (torch.autograd.grad(o.square().sum(), sources, retain_graph=True) for o in (out, expected))
    for a, b in zip(own, plain, strict=True):
        torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-5)
