"""Rollouts by length, and what ranks are given of them."""

from __future__ import annotations

from prl.plan.workload import micro_batches, part


def test_micro_batches_are_those_of_the_packer() -> None:
    ranks = micro_batches((6, 5, 4, 3, 2), data_ranks=2, micro_batch_tokens=10)
    assert sorted(length for rank in ranks for micro in rank for length in micro) == [2, 3, 4, 5, 6]
    assert {len(rank) for rank in ranks} == {1}
    assert [sum(map(sum, rank)) for rank in ranks] == [10, 10]


def test_every_rank_has_as_many_micro_batches_as_the_others() -> None:
    ranks = micro_batches((6, 5, 4), data_ranks=2, micro_batch_tokens=6)
    assert [len(rank) for rank in ranks] == [2, 2]
    assert sorted(sum(micro) for rank in ranks for micro in rank) == [0, 4, 5, 6]


def test_a_share_of_documents_ends_where_the_next_rank_begins() -> None:
    assert part((10, 6), 2) == (8,)
    assert part((5, 6, 5), 2) == (5, 3)
    assert part((5, 6), 1) == (5, 6)
