"""Layouts: what cannot work and why, what a sweep looks at."""

from __future__ import annotations

import pytest
from prl.errors import UserError
from prl.plan.layout import combinations, impossible, neighbours, parsed, shown
from prl.train.layout import Layout


def test_every_reason_is_given_at_once() -> None:
    reasons = impossible(Layout(shard=6, context=2, expert=5), ranks=16, experts=8)
    assert reasons == [
        "replicate x shard x context = 1 x 6 x 2 = 12, and there are 16 ranks",
        "expert=5 does not divide shard x context = 12",
        "expert=5 does not divide the model's 8 experts",
    ]


def test_a_dense_model_has_no_experts_to_divide() -> None:
    assert impossible(Layout(shard=4, expert=2), ranks=4, experts=0) == ["expert=2, and the model has no experts"]
    assert impossible(Layout(replicate=2, shard=2, context=2, expert=4), ranks=8, experts=8) == []


def test_a_sweep_is_every_combination_and_shard_takes_the_ranks_that_are_left() -> None:
    layouts = combinations(Layout(shard=16), 16, parsed("ep=2,4") | parsed("context=1,2"))
    assert [shown(layout) for layout in layouts] == [
        "shard=16 expert=2",
        "shard=8 context=2 expert=2",
        "shard=16 expert=4",
        "shard=8 context=2 expert=4",
    ]


def test_only_degrees_that_divide_the_experts_are_tried() -> None:
    assert neighbours(384)["expert"] == (1, 8, 16, 32, 64)
    assert neighbours(24)["expert"] == (1, 8)
    assert neighbours(0)["expert"] == (1,)


@pytest.mark.parametrize("text", ["pipeline=2", "expert", "expert=", "expert=two", "expert=0"])
def test_what_is_no_degree_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected one of replicate, shard, context, expert"):
        parsed(text)
