"""The feed: a fixed order, retries first, and a state that loses nothing."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prl.dispatch.feed import Feed, Issue, Source
from prl.errors import CheckpointError, UserError


def feed(*sizes: int, weights: tuple[float, ...] = (), seed: int = 0, retries: int = 2) -> Feed:
    shares = weights or (1.0,) * len(sizes)
    named = enumerate(zip(sizes, shares, strict=True))
    sources = [Source(environment=f"e{i}", weight=share, size=size) for i, (size, share) in named]
    return Feed(sources, seed=seed, retries=retries)


def take(source: Feed, count: int) -> list[Issue]:
    return [source.next() for _ in range(count)]


def test_every_task_occurs_once_in_every_epoch():
    issues = take(feed(7), 21)
    epochs = [[issue.task.index for issue in issues[start : start + 7]] for start in (0, 7, 14)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 3
    assert epochs[0] != epochs[1]


def test_group_ids_count_issues():
    assert [issue.group_id for issue in take(feed(5), 12)] == list(range(12))


def test_the_order_depends_on_the_seed_alone():
    first, again, other = take(feed(50, 20), 40), take(feed(50, 20), 40), take(feed(50, 20, seed=1), 40)
    assert first == again
    assert first != other


def test_environments_are_drawn_by_weight():
    issues = take(feed(100, 100, 100, weights=(3.0, 1.0, 0.0)), 4000)
    counts = Counter(issue.task.environment for issue in issues)
    assert counts["e2"] == 0
    assert abs(counts["e0"] - 3000) < 140  # five standard deviations


def test_tasks_are_of_the_train_split():
    assert {issue.task.split for issue in take(feed(5), 5)} == {"train"}


def test_a_huge_split_is_no_trouble():
    issues = take(feed(10**14), 100)
    assert len({issue.task.index for issue in issues}) == 100


def test_what_failed_is_issued_again_before_anything_fresh():
    source = feed(9)
    first, second = take(source, 2)
    assert source.retry(first)
    assert source.retry(second)
    assert source.waiting == [0, 1]
    again = take(source, 3)
    assert [(i.group_id, i.attempt, i.task) for i in again[:2]] == [(0, 1, first.task), (1, 1, second.task)]
    assert again[2].group_id == 2


def test_a_task_is_given_up_after_its_retries():
    source = feed(9, retries=2)
    issue = source.next()
    for attempt in (1, 2):
        assert source.retry(issue)
        issue = source.next()
        assert (issue.group_id, issue.attempt) == (0, attempt)
    assert not source.retry(issue)
    assert source.next().group_id == 1
    assert source.state_dict()["outstanding"][0]["group_id"] == 1


def test_a_group_that_ended_is_no_longer_outstanding():
    source = feed(9)
    take(source, 3)
    source.finish([0, 2])
    assert [record["group_id"] for record in source.state_dict()["outstanding"]] == [1]
    assert source.outstanding(1).group_id == 1


@given(before=st.lists(st.sampled_from(["next", "retry", "finish"]), max_size=40), seed=st.integers(0, 3))
def test_a_restored_feed_issues_what_was_outstanding_and_goes_on_with_the_rest(before, seed):
    after = 20
    source = feed(6, 11, weights=(1.0, 2.0), seed=seed)
    flying: list[Issue] = []
    for action in before:
        if action == "next":
            flying.append(source.next())
        elif flying and action == "retry":
            source.retry(flying.pop(0))
        elif flying:
            source.finish([flying.pop(0).group_id])
    state = json.loads(json.dumps(source.state_dict()))
    restored = feed(6, 11, weights=(1.0, 2.0), seed=seed)
    restored.load_state_dict(state)
    outstanding = [record["group_id"] for record in state["outstanding"]]
    issues = take(restored, len(outstanding) + after)
    assert [issue.group_id for issue in issues[: len(outstanding)]] == outstanding
    untouched = feed(6, 11, weights=(1.0, 2.0), seed=seed)
    assert issues[len(outstanding) :] == take(untouched, state["issued"] + after)[state["issued"] :]


def test_a_checkpoint_of_other_environments_is_refused():
    with pytest.raises(CheckpointError, match=r"train splits of \{'e0': 5\} tasks, this run has \{'e0': 6\}"):
        feed(6).load_state_dict(feed(5).state_dict())


@pytest.mark.parametrize(
    ("sizes", "weights", "sentence"),
    [
        ((0,), (1.0,), "environment 'e0' has no task in its train split"),
        ((5, 5), (0.0, 0.0), "every environment has weight 0"),
    ],
)
def test_a_feed_without_tasks_is_the_users_mistake(sizes, weights, sentence):
    with pytest.raises(UserError, match=sentence):
        feed(*sizes, weights=weights)


def test_an_empty_environment_of_weight_zero_is_fine():
    assert take(feed(0, 5, weights=(0.0, 1.0)), 3)[0].task.environment == "e1"


def test_a_restored_group_that_is_finished_is_not_issued_again():
    source = feed(5)
    first, second = take(source, 2)
    restored = feed(5)
    restored.load_state_dict(source.state_dict())
    assert restored.reclaim(first.group_id) == first
    assert restored.waiting == [second.group_id]
    assert restored.holds(first.group_id)
    restored.finish([first.group_id])
    assert not restored.holds(first.group_id)
    assert [issue.group_id for issue in take(restored, 2)] == [1, 2]
