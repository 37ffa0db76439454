"""Advantages onto tokens."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
from prl.errors import RunError
from prl.score.credit import score
from prl.types import Group, TaskRef

from tests.dispatch.fakes import rollout

TASK = TaskRef(environment="toy", split="train", index=0)


def group(*rewards: float) -> Group:
    rollouts = tuple(rollout(f"0.{i}", reward=r, prompt=2, sampled=1 + i) for i, r in enumerate(rewards))
    return Group(group_id=9, task=TASK, attempt=0, started_version=0, rollouts=rollouts)


def test_one_number_per_rollout_is_spread_over_its_sampled_tokens():
    scored = score(group(0.0, 1.0), lambda g: [-0.5, 0.25])
    assert [sample.advantages.tolist() for sample in scored.samples] == [[0, 0, -0.5], [0, 0, 0.25, 0.25]]
    assert scored.advantages == (-0.5, 0.25)
    assert all(sample.advantages.dtype == np.float32 for sample in scored.samples)


def test_one_number_per_token_is_kept_where_tokens_were_sampled():
    scored = score(group(0.0, 1.0), lambda g: [[9, 9, 2], [9, 9, 1, 3]])
    assert [sample.advantages.tolist() for sample in scored.samples] == [[0, 0, 2], [0, 0, 1, 3]]
    assert scored.advantages == (2.0, 2.0)


def test_sampled_tokens_and_no_others_are_in_the_rl_stream():
    (sample,) = score(group(1.0), lambda g: [0.0]).samples
    assert {stream: weights.tolist() for stream, weights in sample.weights.items()} == {"rl": [0, 0, 1]}


def test_rollouts_without_advantage_stay_in_the_batch():
    scored = score(group(1.0, 1.0), lambda g: [0.0, 0.0])
    assert [int(sample.weights["rl"].sum()) for sample in scored.samples] == [1, 2]


def test_columns_of_the_rollout_are_carried_over():
    source = group(1.0)
    (sample,) = score(source, lambda g: [1.0]).samples
    for name in ("tokens", "sampled", "versions"):
        assert getattr(sample, name) is getattr(source.rollouts[0], name)
    assert sample.engine_logprobs is source.rollouts[0].logprobs
    assert sample.temperature == source.rollouts[0].temperature


def test_a_rollout_that_sampled_nothing_has_advantage_zero():
    empty = attrs.evolve(rollout("0.0"), sampled=np.zeros(5, dtype=np.bool_))
    scored = score(attrs.evolve(group(1.0), rollouts=(empty,)), lambda g: [3.0])
    assert scored.advantages == (0.0,)
    assert not scored.samples[0].advantages.any()


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ([1.0], "gave 1 values for the 2 rollouts of group 9; it must give one per rollout"),
        ([1.0, [1.0, 2.0]], "gave 2 values for the 4 tokens of rollout 0.1; it must give"),
        ([1.0, float("nan")], "a value that is not finite for rollout 0.1"),
        ([[0, 0, float("inf")], 1.0], "a value that is not finite for rollout 0.0"),
    ],
)
def test_an_answer_that_does_not_fit_the_group_ends_the_run(answer, sentence):
    with pytest.raises(RunError, match=sentence):
        score(group(0.0, 1.0), lambda g: answer)
