"""`--sweep`: every combination, by name."""

from __future__ import annotations

import pytest
from prl.compose.sweep import members
from prl.errors import UserError


def test_every_combination_has_a_folder_and_its_settings() -> None:
    every = members(["run.seed=0,1", "optimizer.learning_rate=1e-4, 3e-4"])
    assert [member.name for member in every] == [
        "0-seed=0-learning_rate=1e-4",
        "1-seed=0-learning_rate=3e-4",
        "2-seed=1-learning_rate=1e-4",
        "3-seed=1-learning_rate=3e-4",
    ]
    assert every[2].overrides == ("run.seed=1", "optimizer.learning_rate=1e-4")


def test_values_are_toml_and_names_are_not() -> None:
    every = members(["trainer.recompute=['a','b'],[]", 'model.name="x, y/z"'])
    assert [member.overrides for member in every] == [
        ("trainer.recompute=['a','b']", 'model.name="x, y/z"'),
        ("trainer.recompute=[]", 'model.name="x, y/z"'),
    ]
    assert [member.name for member in every] == ["0-recompute=_a_b_-name=_x_y_z_", "1-recompute=_-name=_x_y_z_"]


def test_names_sort_as_numbers() -> None:
    assert [member.name for member in members([f"run.seed={','.join(map(str, range(11)))}"])][9:] == [
        "09-seed=9",
        "10-seed=10",
    ]


@pytest.mark.parametrize("axis", ["run.seed", "=1,2", "run.seed=", "run.seed= ,1"])
def test_what_is_no_axis_is_refused(axis: str) -> None:
    with pytest.raises(UserError, match="expected KEY=VALUE,VALUE"):
        members([axis])


def test_a_setting_is_swept_once() -> None:
    with pytest.raises(UserError, match=r"run.seed, run.seed names a setting twice"):
        members(["run.seed=1", "run.seed=2"])
