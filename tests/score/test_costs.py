"""Costs between and beyond the lengths that are known."""

from __future__ import annotations

import pytest
from prl.score.costs import BY_TOKENS, Costs, points


def test_lengths_are_costs_where_every_token_costs_the_same():
    assert BY_TOKENS.of([0, 1, 7, 100_000]) == [0, 1, 7, 100_000]


def test_a_parabola_is_followed_closely_from_the_shortest_to_the_longest():
    longest = 131_072
    at = points(longest)
    assert (at[0], at[-1], len(at)) == (0, longest, 66)
    parabola = Costs(tuple(at), tuple(n + n * n / 8192 for n in at))
    for n in (3, 100, 1000, 20_000, 100_001):
        assert parabola.of([n]) == [pytest.approx(n + n * n / 8192, rel=0.01)]


def test_short_sequences_have_a_point_each():
    assert points(5) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("lengths", "costs"), [((0,), (0.0,)), ((0, 1), (0.0,)), ((0, 5, 5), (0.0, 1.0, 2.0))])
def test_what_is_no_curve_is_refused(lengths, costs):
    with pytest.raises(ValueError, match="needs two lengths at least, ascending, with a cost each"):
        Costs(lengths, costs)
