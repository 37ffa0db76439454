"""The memory of an advantage, as checkpoints see it."""

from __future__ import annotations

from prl.score.credit_state import CreditState
from prl.types import Group, TaskRef

from tests.dispatch.fakes import rollout
from tests.score.baseline import RunningBaseline


class Other(RunningBaseline):
    """Another advantage with a memory."""


def group(*rewards: float) -> Group:
    rollouts = tuple(rollout(f"0.{i}", reward=reward) for i, reward in enumerate(rewards))
    task = TaskRef(environment="toy", split="train", index=0)
    return Group(group_id=0, task=task, attempt=0, started_version=0, rollouts=rollouts)


def test_a_checkpoint_has_the_state_before_the_oldest_batch_that_is_not_trained() -> None:
    credit = CreditState(RunningBaseline())
    for version, reward in enumerate((1.0, 2.0, 4.0)):
        credit.forming(version, trained=max(0, version - 1))
        credit.advantage(group(reward))
    assert credit.state_dict(trained=1)["state"] == {"total": 1.0, "seen": 1}
    assert credit.state_dict(trained=2)["state"] == {"total": 3.0, "seen": 2}
    assert credit.state_dict(trained=3)["state"] == {"total": 7.0, "seen": 3}


def test_a_state_is_taken_up_by_the_same_advantage_and_by_no_other() -> None:
    saved = CreditState(RunningBaseline(total=6.0, seen=3)).state_dict(trained=0)
    again, other = CreditState(RunningBaseline()), CreditState(Other())
    again.load_state_dict(saved)
    other.load_state_dict(saved)
    assert again.advantage(group(3.0)) == [1.0]
    assert other.advantage(group(3.0)) == [3.0]


def test_an_advantage_without_a_memory_has_no_state() -> None:
    credit = CreditState(lambda group: [0.0])
    credit.forming(0, trained=0)
    saved = credit.state_dict(trained=0)
    assert saved["state"] == {}
    credit.load_state_dict(saved)
    credit.load_state_dict({})
