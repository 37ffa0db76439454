"""Bins of about the same cost."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from prl.score.bins import assign, first_fit_decreasing, karmarkar_karp

lengths = st.lists(st.integers(1, 30), max_size=25)


def of_attention(lengths, attention_length):
    """Costs of sequences whose attention costs as much as the rest at `attention_length` tokens."""
    return [length * (1 + length / attention_length) for length in lengths]


@given(lengths=lengths, capacity=st.integers(30, 60))
def test_first_fit_decreasing_wastes_little(lengths, capacity):
    bins = first_fit_decreasing(lengths, capacity)
    fewest = -(-sum(lengths) // capacity)
    assert len(bins) <= max(fewest, 1.7 * fewest + 1)
    assert sorted(i for chosen in bins for i in chosen) == list(range(len(lengths)))


def test_differencing_by_hand():
    """Karmarkar and Karp's own example of two bins: 8 7 6 5 4 differ by 2."""
    bins = karmarkar_karp([8, 7, 6, 5, 4], 2)
    sums = sorted(sum([8, 7, 6, 5, 4][i] for i in chosen) for chosen in bins)
    assert sums == [14, 16]


@given(costs=st.lists(st.integers(1, 50), min_size=1, max_size=20), count=st.integers(1, 6))
def test_every_item_is_in_one_bin_and_none_is_empty_if_there_are_enough(costs, count):
    bins = karmarkar_karp(costs, count)
    assert len(bins) == count
    assert sorted(i for chosen in bins for i in chosen) == list(range(len(costs)))
    assert sum(not chosen for chosen in bins) == max(0, count - len(costs))


def test_bins_cost_the_same_and_not_only_count_as_many_tokens():
    """One long sample costs as much as many short ones: its rank is given fewer tokens."""
    lengths = [4000, *[500] * 26]
    each = of_attention(lengths, 1000)
    assigned = assign(lengths, each, 2, capacity=16_000)
    costs = [sum(each[i] for chosen in rank for i in chosen) for rank in assigned]
    assert max(costs) / min(costs) < 1.1
    tokens = sorted(sum(lengths[i] for chosen in rank for i in chosen) for rank in assigned)
    assert tokens[0] < 0.7 * tokens[1]


def test_what_is_computed_at_the_same_time_costs_about_the_same():
    draw = np.random.default_rng(0)
    lengths = draw.integers(100, 8000, 300).tolist()
    each = of_attention(lengths, 8192)
    assigned = assign(lengths, each, 8, capacity=20_000)
    wasted = total = 0.0
    for micro_batches in zip(*assigned, strict=True):
        costs = [sum(each[i] for i in chosen) for chosen in micro_batches]
        wasted += sum(max(costs) - c for c in costs)
        total += sum(costs)
    assert wasted / total < 0.03


@given(lengths=lengths, ranks=st.integers(1, 4), capacity=st.integers(5, 60))
def test_bins_fit_and_ranks_have_equally_many(lengths, ranks, capacity):
    assigned = assign(lengths, lengths, ranks, capacity=capacity)
    assert len({len(rank) for rank in assigned}) == 1
    for chosen in (chosen for rank in assigned for chosen in rank):
        assert sum(lengths[i] for i in chosen) <= capacity or len(chosen) == 1
