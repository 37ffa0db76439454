"""How ranks are laid out, and every reason why they cannot be."""

from __future__ import annotations

import pytest
from prl.compose.config import TrainerSection
from prl.train import layout
from prl.train.layout import Layout, layout_of, problems


def test_what_is_left_is_sharded():
    seen = layout_of(TrainerSection(ranks=16, replicate=2, context=4, expert=4))
    assert seen == Layout(replicate=2, shard=2, context=4, expert=4)
    assert (seen.ranks, seen.data) == (16, 4)
    assert not list(problems(TrainerSection(ranks=16, replicate=2, context=4, expert=4)))


def test_ranks_of_a_context_group_are_neighbours():
    places = [Layout(replicate=2, shard=2, context=2).place(rank) for rank in range(8)]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"ranks": 6, "context": 4}, ("trainer.ranks", "must be a multiple of 4 (replicate 1 x context 4), got 6")),
        (
            {"ranks": 8, "shard": 3, "context": 2},
            ("trainer.ranks", "must be 6 (replicate 1 x context 2 x shard 3), got 8"),
        ),
        (
            {"ranks": 8, "replicate": 2, "expert": 3},
            ("trainer.expert", "must divide the 4 ranks (shard x context) of a copy, got 3"),
        ),
        (
            {"recompute": ("mlp",)},
            ("trainer.recompute", 'is for activation_checkpointing = "selective", which is "none"'),
        ),
    ],
)
def test_what_cannot_be(section, expected):
    assert [(problem.path, problem.message) for problem in problems(TrainerSection(**section))] == [expected]


def test_all_reasons_come_at_once_and_a_missing_library_is_one(monkeypatch):
    monkeypatch.setattr(layout, "find_spec", lambda name: None)
    section = TrainerSection(ranks=4, expert=3, recompute=("mlp",))
    found = [problem.path for problem in problems(section)]
    assert found == ["trainer.expert", "trainer.recompute", "trainer.ranks"]
    assert "pip install 'prl[titan]'" in list(problems(section))[-1].message
