"""Orders and seeds made of integers."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from prl.dispatch.permutation import Permutation, fraction, mix, sampling_seed


@given(size=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_every_index_has_its_own_image(size, key):
    order = Permutation(size, key)
    assert sorted(order(i) for i in range(size)) == list(range(size))


def test_a_permutation_of_a_huge_range_costs_nothing_to_make():
    size = 10**15
    order = Permutation(size, 1)
    images = [order(i) for i in range(2000)]
    assert len(set(images)) == 2000
    assert 0 <= min(images) < size / 100
    assert size * 0.99 < max(images) < size


def test_keys_give_unrelated_orders():
    orders = np.array([[Permutation(500, key)(i) for i in range(500)] for key in range(12)])
    correlations = np.corrcoef(orders)[np.triu_indices(12, 1)]
    assert abs(correlations).max() < 0.2  # 1 / sqrt(500) = 0.045 is one standard deviation


def test_hashes_are_the_same_everywhere_and_for_ever():
    assert mix(0) == 0xE220A8397B1DCDAF  # first output of SplitMix64 seeded with 0
    assert mix(1, 2, 3) == 0x6AE515C1C0AC7E37
    assert [Permutation(10, 4)(i) for i in range(10)] == [6, 0, 1, 9, 5, 8, 4, 3, 2, 7]
    assert sampling_seed(7, 41, 2) == 7410103474118983680


def test_fractions_are_uniform():
    values = [fraction(3, i) for i in range(4000)]
    counts, _ = np.histogram(values, bins=10, range=(0, 1))
    assert counts.sum() == 4000
    assert abs(counts - 400).max() < 100  # five standard deviations


def test_no_two_members_of_a_run_share_a_seed():
    seeds = {
        sampling_seed(5, group_id, attempt) + member
        for group_id in range(-200, 800)
        for attempt in range(4)
        for member in (0, 1, 63, 65535)
    }
    assert len(seeds) == 1000 * 4 * 4
    assert min(seeds) >= 0
    assert max(seeds) < 1 << 63


def test_seeds_depend_on_the_run():
    assert sampling_seed(1, 0, 0) != sampling_seed(2, 0, 0)
    assert sampling_seed(1, 0, 0) == sampling_seed(1, 0, 0)
