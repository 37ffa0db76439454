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


@pytest.mark.parametrize(
    ("section", "nodes", "least", "found"),
    [
        ({"ranks": 16, "nodes": 4}, 3, 1, (3, 12, 1, 0)),
        ({"ranks": 16, "nodes": 4, "shard": 16}, 3, 2, (3, 12, 1, 0)),
        ({"ranks": 16, "nodes": 4, "context": 4, "expert": 8}, 3, 1, (2, 8, 1, 0)),  # expert does not divide 12
        ({"ranks": 16, "nodes": 4, "replicate": 2}, 3, 2, (3, 12, 2, 0)),
        ({"ranks": 16, "nodes": 4, "replicate": 4, "shard": 4}, 3, 2, (3, 12, 3, 4)),  # a whole copy is given up
        ({"ranks": 16, "nodes": 4, "context": 4, "expert": 16}, 3, 1, None),
        ({"ranks": 16, "nodes": 4}, 1, 2, None),
        ({"ranks": 2, "nodes": 2}, 0, 1, None),
    ],
)
def test_fewer_nodes_hold_what_the_mesh_allows(section, nodes, least, found):
    fewer = layout.on_fewer_nodes(TrainerSection(**section), nodes, least=least)
    assert (fewer and (fewer.nodes, fewer.ranks, fewer.replicate, fewer.shard)) == found


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
        (
            {"activation_offload": True},
            (
                "trainer.activation_offload",
                'moves what recomputed layers begin with: set trainer.activation_checkpointing to "full" or '
                '"selective"',
            ),
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
