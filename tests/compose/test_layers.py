"""Layers: extends, --plugins, --set."""

from __future__ import annotations

from pathlib import Path

import pytest
from prl.compose import layers
from prl.errors import ConfigError


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    return folder


def test_extending_files_merge_key_by_key_left_to_right(tmp_path: Path) -> None:
    write(
        tmp_path,
        first='plugins = ["a", "b"]\n[run]\nsteps = 1\nseed = 1',
        second='plugins = ["c", "a"]\n[run]\nseed = 2',
        top='extends = ["first.toml", "second.toml"]\nplugins = ["d"]\n[run]\ndir = "x"',
    )
    table, problems = layers.resolve(tmp_path / "top.toml")
    assert table == {"plugins": ["a", "b", "c", "d"], "run": {"steps": 1, "seed": 2, "dir": "x"}}
    assert problems == []


def test_a_base_is_found_beside_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep", base="[run]\nsteps = 7", middle='extends = "base.toml"')
    write(tmp_path, top='extends = "deep/middle.toml"')
    assert layers.read(tmp_path / "top.toml") == {"run": {"steps": 7}}


def test_changing_a_type_drops_the_inherited_keys_of_its_section_only(tmp_path: Path) -> None:
    write(
        tmp_path,
        base='[losses.rl]\ntype = "a"\nclip_low = 1.0\n[losses.ce]\ntype = "c"\nx = 1',
        same='extends = "base.toml"\n[losses.rl]\ntype = "a"\nclip_high = 2.0',
        other='extends = "base.toml"\n[losses.rl]\ntype = "b"\nclip_high = 2.0',
    )
    assert layers.read(tmp_path / "same.toml")["losses"]["rl"] == {"type": "a", "clip_low": 1.0, "clip_high": 2.0}
    assert layers.read(tmp_path / "other.toml")["losses"] == {
        "rl": {"type": "b", "clip_high": 2.0},
        "ce": {"type": "c", "x": 1},
    }


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"a": 'extends = "b.toml"', "b": 'extends = "a.toml"'}, "extends itself"),
        ({"a": 'extends = "nowhere.toml"'}, "cannot be read"),
        ({"a": "extends = 3"}, "expected a path or an array of paths, got 3"),
        ({"a": "x = "}, "is not valid TOML"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_config_error(tmp_path: Path, files: dict[str, str], sentence: str) -> None:
    write(tmp_path, **files)
    with pytest.raises(ConfigError, match=sentence):
        layers.read(tmp_path / "a.toml")


@pytest.mark.parametrize(
    ("edits", "plugins"),
    [("", ["a", "b"]), ("c", ["a", "b", "c"]), ("a", ["a", "b"]), ("no:a", ["b"]), (" no:b , c,no:a", ["c"])],
)
def test_plugins_are_appended_and_removed(tmp_path: Path, edits: str, plugins: list[str]) -> None:
    write(tmp_path, top='plugins = ["a", "b"]')
    assert layers.resolve(tmp_path / "top.toml", plugins=edits)[0]["plugins"] == plugins


def test_removing_a_plugin_that_is_not_named_is_a_problem(tmp_path: Path) -> None:
    write(tmp_path, top='plugins = ["console"]')
    _, problems = layers.resolve(tmp_path / "top.toml", plugins="no:consol")
    assert [p.message for p in problems] == ["--plugins no:consol: not in the list (did you mean 'console'?)"]


@pytest.mark.parametrize(
    ("override", "value"),
    [("3", 3), ("1e-3", 1e-3), ("true", True), ('"3"', "3"), ("runs/x", "runs/x"), ("[1, 2]", [1, 2]), ("", "")],
)
def test_set_parses_toml_and_takes_anything_else_as_a_string(tmp_path: Path, override: str, value: object) -> None:
    write(tmp_path, top="")
    table, problems = layers.resolve(tmp_path / "top.toml", overrides=[f"a.b={override}"])
    assert (table["a"], problems) == ({"b": value}, [])


@pytest.mark.parametrize("path", ["environments.1.weight", "environments[1].weight"])
def test_set_reaches_into_lists_by_index(tmp_path: Path, path: str) -> None:
    write(tmp_path, top="[[environments]]\n[[environments]]\nweight = 1.0")
    table, _ = layers.resolve(tmp_path / "top.toml", overrides=[f"{path}=2.0"])
    assert table["environments"] == [{}, {"weight": 2.0}]


@pytest.mark.parametrize("swapped", [False, True])
def test_setting_a_type_drops_its_sections_keys_whatever_the_order(tmp_path: Path, swapped: bool) -> None:
    write(tmp_path, top='[loss]\ntype = "a"\nold = 1')
    overrides = ["loss.type=b", "loss.new=2"]
    table, _ = layers.resolve(tmp_path / "top.toml", overrides=overrides[::-1] if swapped else overrides)
    assert table["loss"] == {"type": "b", "new": 2}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("steps", "expected section.key=value"),
        (".steps=1", "expected section.key=value"),
        ("run.steps.x=1", "run.steps is 3, not a table"),
        ("environments.4.weight=1", "environments has 1 entry, counted from 0; there is no '4'"),
        ("environments.first.weight=1", "there is no 'first'"),
    ],
)
def test_a_set_that_leads_nowhere_is_a_problem(tmp_path: Path, override: str, sentence: str) -> None:
    write(tmp_path, top="[run]\nsteps = 3\n[[environments]]\nweight = 1.0")
    _, problems = layers.resolve(tmp_path / "top.toml", overrides=[override])
    assert len(problems) == 1
    assert sentence in problems[0].message
