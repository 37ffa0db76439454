"""Which rows are computed for a micro-batch: what siblings share once, and few distinct numbers of rows."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
from prl.train.rows import rows_of

from tests.train.tiny import pack_batch, random_samples, siblings


def test_siblings_share_their_prompt_and_every_token_has_a_row():
    (micro,) = pack_batch([*siblings(0), *siblings(1, prompt=4), *siblings(2, count=1)]).ranks[0]
    rows = rows_of(micro, share=True)
    assert rows.source is not None
    assert rows.kept is not None
    total = len(micro.tokens)
    np.testing.assert_array_equal(rows.tokens[rows.source[:total]], micro.tokens)
    np.testing.assert_array_equal(rows.source[rows.kept], np.arange(len(rows.tokens)))
    assert len(set(rows.source[:total])) == total - 3 * 6 - 3 * 4
    assert len(set(rows.source[np.flatnonzero(micro.sampled)])) == micro.sampled.sum()


def test_what_is_trained_is_never_shared():
    first, second = siblings(0, count=2)
    equal = [attrs.evolve(first), attrs.evolve(first, advantages=-first.advantages)]
    (micro,) = pack_batch(equal).ranks[0]
    rows = rows_of(micro, share=True)
    assert rows.source is not None
    assert len(set(rows.source)) == 2 * len(first) - 6
    trained_prompt = attrs.evolve(second, weights={"ce": np.arange(len(second)).astype(np.float32)})
    (micro,) = pack_batch([first, trained_prompt]).ranks[0]
    rows = rows_of(micro, share=True)
    assert rows.source is not None
    assert len(rows.tokens) == len(micro.tokens) - 1, "only the first token, which nothing predicts"


def test_nothing_changes_where_nothing_is_shared_or_nobody_can_use_it():
    (micro,) = pack_batch(random_samples(5)).ranks[0]
    assert rows_of(micro, share=True).source is None
    (micro,) = pack_batch(siblings(0)).ranks[0]
    rows = rows_of(micro, share=False)
    assert rows.source is None
    np.testing.assert_array_equal(rows.tokens, micro.tokens)


@pytest.mark.parametrize(
    ("lengths", "rounded"),
    [((70, 80, 75, 83), 312), ((64, 64, 66), 196), ((50, 51), 102), ((50, 50), 100), ((3, 4), 7)],
)
def test_few_distinct_lengths_reach_the_kernels(lengths: tuple[int, ...], rounded: int) -> None:
    """At most one part in 32 is added, and nothing where samples are of one length."""
    (micro,) = pack_batch(random_samples(len(lengths))).ranks[0]
    count = sum(lengths)
    bounds = np.cumsum([0, *lengths], dtype=np.int32)
    micro = attrs.evolve(micro, tokens=np.arange(1, count + 1, dtype=np.int32), cu_seqlens=bounds)
    rows = rows_of(micro, share=False)
    assert rows.tokens.tolist() == [*range(1, count + 1), *[0] * (rounded - count)]
    assert rows.cu_seqlens.tolist() == [*bounds, *[rounded] * (rounded > count)]
