from __future__ import annotations

import torch
from prl.blocks.context import Context


def test_packed_positions_restart_with_every_sequence() -> None:
    context = Context.packed(torch.tensor([0, 3, 4, 4, 6], dtype=torch.int32))
    assert context.lengths == (3, 1, 0, 2)
    assert context.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert context.longest == 3
    assert context.caches is None
    assert not context.decoding


def test_cached_positions_continue_the_past() -> None:
    context = Context.cached([], lengths=[2, 3, 0], rows=slice(1, 4), past=[5, 0, 7])
    assert context.positions.tolist() == [5, 6, 0, 1, 2]
    assert (context.past_min, context.past_max, context.longest) == (0, 7, 7)
    assert not context.decoding


def test_one_new_token_each_is_decoding() -> None:
    context = Context.cached([], lengths=[1, 1], rows=slice(0, 2), past=[5, 9])
    assert context.decoding
    assert context.positions.tolist() == [5, 9]
    assert context.longest == 10


def test_two_tokens_of_one_sequence_and_none_of_another_are_not_decoding() -> None:
    assert not Context.cached([], lengths=[2, 0], rows=slice(0, 2), past=[5, 9]).decoding


def test_nothing_at_all() -> None:
    context = Context.packed(torch.tensor([0]))
    assert context.lengths == ()
    assert len(context.positions) == 0
