from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prl.blocks.dsa import select_topk
from prl_packed_topk import PackedTopkConfig
from prl_packed_topk.kernel import build

packed = build(PackedTopkConfig())
scores = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, 3.5, -3.5, 3e38, -3e38, float("-inf")])


@given(st.lists(scores, min_size=1, max_size=12), st.integers(1, 14))
def test_ties_signs_and_unseen_tokens_as_in_the_reference(row: list[float], count: int) -> None:
    given_scores = torch.tensor([row, row[::-1]])
    assert packed(given_scores, count).tolist() == select_topk.reference(given_scores, count).tolist()


@pytest.mark.parametrize(("keys", "count"), [(40, 7), (300, 300), (300, 400), (2000, 512)])
def test_many_tokens_as_in_the_reference(keys: int, count: int) -> None:
    draw = torch.Generator().manual_seed(keys)
    values = torch.randn(3, 5, keys, generator=draw)
    values = torch.where(torch.rand(3, 5, keys, generator=draw) < 0.3, 0.0, values).relu()  # as an indexer's: many ties
    values = values.masked_fill(torch.arange(keys) > keys * 3 // 4, float("-inf"))
    assert torch.equal(packed(values, count), select_topk.reference(values, count))
