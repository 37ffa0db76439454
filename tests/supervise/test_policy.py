"""What is tried again, how often, and when it is given up."""

from __future__ import annotations

import pytest
from prl.compose.config import FailureSection
from prl.supervise.policy import RestartBudget, how_it_ended, is_accident


@pytest.mark.parametrize(
    ("code", "before", "under_way"),
    [
        (1, False, False),
        (2, False, False),
        (3, False, False),
        (70, False, True),
        (75, False, True),
        (7, False, True),
        (-9, True, True),
        (137, True, True),
    ],
)
def test_an_accident_is_what_a_restart_may_mend(code: int, before: bool, under_way: bool) -> None:
    assert is_accident(code, under_way=False) == before
    assert is_accident(code, under_way=True) == under_way


def test_an_end_is_put_in_words() -> None:
    assert how_it_ended(7) == "exited with code 7"
    assert how_it_ended(-9) == "was ended by SIGKILL"


def test_pauses_double_and_stay_bounded() -> None:
    budget = RestartBudget(FailureSection(restarts=20, window=10, backoff=3.0))
    pauses = [budget.spend("engine-0", 1) for _ in range(8)]
    assert pauses == [0.0, 3.0, 6.0, 12.0, 24.0, 48.0, 64.0, 64.0]


def test_a_process_that_dies_again_and_again_is_given_up_and_others_are_not() -> None:
    budget = RestartBudget(FailureSection(restarts=2, window=10))
    assert [budget.spend("engine-0", step) for step in (4, 5, 6)] == [0.0, 1.0, None]
    assert "restarted 2 times while the run trained fewer than 10 steps" in budget.exhausted("engine-0")
    assert budget.spend("engine-1", 6) == 0.0


def test_steps_that_were_trained_meanwhile_win_restarts_back() -> None:
    budget = RestartBudget(FailureSection(restarts=1, window=10))
    assert [budget.spend("trainer-0", step) for step in (3, 12, 13, 22, 23)] == [0.0, None, 0.0, None, 0.0]


def test_no_restart_may_be_allowed() -> None:
    budget = RestartBudget(FailureSection(restarts=0))
    assert budget.spend("engine-0", 0) is None
    assert "allows no restart" in budget.exhausted("engine-0")
