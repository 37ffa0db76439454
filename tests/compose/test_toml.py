"""Writing TOML: whatever is written is read back."""

from __future__ import annotations

import tomllib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from prl.compose import toml

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
leaves = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | texts | st.datetimes()
values = st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3), max_leaves=8)


@given(st.dictionaries(texts, values, max_size=4))
def test_what_is_written_is_read_back(table: dict[str, Any]) -> None:
    assert tomllib.loads(toml.dumps(table)) == table


def test_sections_are_written_as_sections() -> None:
    table = {"losses": {"rl": {"type": "a"}}, "plugins": ["x"], "environments": [{"n": 1}, {"n": 2, "sub": {"m": 3}}]}
    assert toml.dumps(table).splitlines() == [
        'plugins = ["x"]',
        "",
        "[losses.rl]",
        'type = "a"',
        "",
        "[[environments]]",
        "n = 1",
        "",
        "[[environments]]",
        "n = 2",
        "",
        "[environments.sub]",
        "m = 3",
    ]


def test_flatten_names_every_leaf_by_its_path() -> None:
    table = {"run": {"steps": 3}, "environments": [{"weight": 1.0}], "trackers": [], "words": ["a", "b"], "none": {}}
    assert toml.flatten(table) == {
        "run.steps": 3,
        "environments[0].weight": 1.0,
        "trackers": [],
        "words": ["a", "b"],
        "none": {},
    }
