"""GRPO's advantage."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prl.types import Group, TaskRef
from prl_group_relative import GrpoConfig, prl_advantages
from prl_group_relative.grpo import build

from tests.dispatch.fakes import rollout

rewards = st.lists(st.floats(-100, 100), min_size=1, max_size=12)


def advantages(rewards: list[float], *, normalize: bool = False) -> list[float]:
    task = TaskRef(environment="toy", split="train", index=0)
    rollouts = tuple(rollout(f"0.{i}", reward=reward) for i, reward in enumerate(rewards))
    group = Group(group_id=0, task=task, attempt=0, started_version=0, rollouts=rollouts)
    return list(build(GrpoConfig(normalize=normalize))(group))


def test_reward_minus_mean():
    assert advantages([1.0, 0.0, 0.0, 1.0]) == [0.5, -0.5, -0.5, 0.5]
    assert advantages([3.0, 1.0, 2.0]) == [1.0, -1.0, 0.0]


def test_normalised_by_the_standard_deviation():
    assert advantages([2.0, 0.0], normalize=True) == pytest.approx([1.0, -1.0], rel=1e-5)
    assert advantages([4.0, 0.0, 2.0], normalize=True) == pytest.approx([1.5**0.5, -(1.5**0.5), 0.0], rel=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_equal_rewards_are_worth_exactly_nothing(normalize):
    assert advantages([0.1] * 3, normalize=normalize) == [0.0, 0.0, 0.0]
    assert advantages([0.7], normalize=normalize) == [0.0]


@given(rewards)
def test_advantages_of_a_group_sum_to_zero(rewards):
    assert sum(advantages(rewards)) == pytest.approx(0.0, abs=1e-9)


@given(rewards, st.floats(-10, 10))
def test_a_shift_of_all_rewards_changes_nothing(rewards, shift):
    shifted = advantages([reward + shift for reward in rewards])
    assert shifted == pytest.approx(advantages(rewards), abs=1e-9)


def test_the_provider_is_called_grpo():
    (provider,) = prl_advantages()
    assert (provider.name, provider.config) == ("grpo", GrpoConfig)
