"""The scheduler of bounded staleness: its bound holds, and it never deadlocks."""

from __future__ import annotations

import time
from pathlib import Path

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prl.compose.compose import compose
from prl.errors import ConfigError
from prl.providers import Drop, InFlight, Pipeline
from prl.types import Group, TaskRef
from prl_bounded_staleness import BoundedStalenessConfig, prl_schedulers
from prl_bounded_staleness.scheduler import BoundedStaleness, build

from tests.dispatch.fakes import rollout

CONFIG = Path(__file__).parents[2] / "configs/guessing.toml"
TASK = TaskRef(environment="toy", split="train", index=0)


def scheduler(max_staleness: int, groups_per_step: int = 4, together: int = 1) -> BoundedStaleness:
    config = BoundedStalenessConfig(max_staleness=max_staleness, together=together)
    return build(config, groups_per_step, time.monotonic)


def group(group_id: int, *versions: int) -> Group:
    """One rollout per version."""
    rollouts = tuple(rollout(f"{group_id}.{i}", version=v) for i, v in enumerate(versions))
    return Group(group_id=group_id, task=TASK, attempt=0, started_version=min(versions), rollouts=rollouts)


def capacity(max_staleness: int, **pipeline: int) -> int:
    return scheduler(max_staleness).capacity(
        Pipeline(**{"version": 0, "next_version": 0, "ready": 0, "running": 0, **pipeline})
    )


# --- by hand ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("max_staleness", "pipeline", "expected"),
    [
        (0, {}, 4),
        (0, {"ready": 1, "running": 2}, 1),
        (0, {"next_version": 1}, 0),  # the batch was formed, its weights are not served yet
        (0, {"next_version": 1, "version": 1}, 4),
        (1, {}, 8),
        (1, {"next_version": 1, "running": 4}, 0),
        (1, {"next_version": 1, "running": 3}, 1),
        (2, {"version": 5, "next_version": 6, "ready": 3, "running": 2}, 3),
        (1, {"next_version": 9}, 0),
        (0, {"running": 40}, 0),
    ],
)
def test_capacity(max_staleness, pipeline, expected):
    assert capacity(max_staleness, **pipeline) == expected


def test_groups_that_start_together_wait_for_room_and_then_fill_it():
    waiting = scheduler(3, together=8)
    seen = [
        waiting.capacity(Pipeline(version=0, next_version=1, ready=ready, running=running))
        for ready, running in [(4, 1), (4, 0), (4, 1), (4, 7), (5, 7), (10, 1), (4, 1), (1, 3)]
    ]
    assert seen == [0, 8, 7, 1, 0, 0, 0, 8]


@pytest.mark.parametrize(
    ("section", "most"),
    [
        ({"scheduler.max_staleness": 1, "scheduler.together": 9}, 8),
        ({"scheduler.max_staleness": 0, "scheduler.together": 2}, 1),
    ],
)
def test_more_than_ever_find_room_are_refused(section, most):
    overrides = [f"{name}={value}" for name, value in section.items()]
    with pytest.raises(ConfigError, match=f"may never find room: at most {most}"):
        compose(CONFIG, overrides=[*overrides, "rollouts.groups_per_step=8"])


def test_a_group_is_as_old_as_its_oldest_token():
    bounded = scheduler(1)
    assert bounded.admit(group(7, 5, 4), 5) is None
    assert bounded.admit(group(7, 5, 3), 5) == Drop(group_id=7, reason="stale", retry=True)


def test_new_weights_cut_what_can_no_longer_be_used():
    in_flight = [InFlight(group_id=i, started_version=v, started_at=0.0) for i, v in ((1, 0), (2, 1), (3, 2), (4, 3))]
    assert [drop.group_id for drop in scheduler(1).on_publish(3, in_flight)] == [1, 2]
    assert [drop.group_id for drop in scheduler(0).on_publish(3, in_flight)] == [1, 2, 3]
    assert scheduler(3).on_publish(3, in_flight) == []


def test_there_is_no_state_to_lose():
    bounded = scheduler(2)
    restored = scheduler(2)
    restored.load_state_dict(bounded.state_dict())
    assert restored == bounded


def test_a_negative_bound_is_refused():
    with pytest.raises(ValueError, match="max_staleness"):
        BoundedStalenessConfig(max_staleness=-1)


def test_the_provider_is_called_bounded_staleness():
    (provider,) = prl_schedulers()
    assert (provider.name, provider.config) == ("bounded_staleness", BoundedStalenessConfig)


# --- against every interleaving ---------------------------------------------------------------------------------------
@attrs.define
class Model:
    """A controller reduced to its counters; every method is one event that may happen when it returns True."""

    scheduler: BoundedStaleness
    version: int = 0
    formed: int = 0
    trained: int = 0
    issued: int = 0
    running: dict[int, int] = attrs.field(factory=dict)  # group -> version when it started
    ready: list[Group] = attrs.field(factory=list)

    def pipeline(self) -> Pipeline:
        return Pipeline(
            version=self.version, next_version=self.formed, ready=len(self.ready), running=len(self.running)
        )

    def start(self, pick: int) -> bool:
        if self.scheduler.capacity(self.pipeline()) == 0:
            return False
        self.running[self.issued] = self.version
        self.issued += 1
        return True

    def finish(self, pick: int) -> bool:
        if not self.running:
            return False
        group_id = list(self.running)[pick % len(self.running)]
        started = self.running.pop(group_id)
        arrived = group(group_id, started, self.version)
        if self.scheduler.admit(arrived, self.formed) is None:
            self.ready.append(arrived)
        return True

    def form(self, pick: int) -> bool:
        self.ready = [g for g in self.ready if self.scheduler.admit(g, self.formed) is None]
        if len(self.ready) < self.scheduler.groups_per_step:
            return False
        batch, self.ready = self.ready[: self.scheduler.groups_per_step], self.ready[self.scheduler.groups_per_step :]
        assert all(self.formed - g.oldest_version <= self.scheduler.max_staleness for g in batch)
        self.formed += 1
        return True

    def train(self, pick: int) -> bool:
        if self.trained == self.formed:
            return False
        self.trained += 1
        return True

    def publish(self, pick: int) -> bool:
        if self.version == self.trained:
            return False
        self.version += 1 + pick % (self.trained - self.version)
        flights = [InFlight(group_id=g, started_version=v, started_at=0.0) for g, v in self.running.items()]
        for drop in self.scheduler.on_publish(self.version, flights):
            assert self.version - self.running.pop(drop.group_id) > self.scheduler.max_staleness
        return True


EVENTS = ("start", "finish", "form", "train", "publish")
events = st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 50)), max_size=150)


@settings(max_examples=150, deadline=None)
@given(events=events, max_staleness=st.integers(0, 3), groups_per_step=st.integers(1, 4), data=st.data())
def test_the_bound_holds_and_something_can_always_happen(events, max_staleness, groups_per_step, data):
    together = data.draw(st.integers(1, max(1, max_staleness * groups_per_step)))
    model = Model(scheduler(max_staleness, groups_per_step, together))
    for name, pick in events:
        getattr(model, name)(pick)
        within = model.formed - model.version <= (max_staleness if together == 1 else 0)
        if within and not model.running and len(model.ready) < groups_per_step:
            assert model.scheduler.capacity(model.pipeline()) > 0
        assert len(model.ready) + len(model.running) <= (max_staleness + 1) * groups_per_step
    assert any(getattr(model, name)(0) for name in EVENTS)


@settings(max_examples=60, deadline=None)
@given(events=events, groups_per_step=st.integers(1, 4))
def test_with_bound_zero_a_step_is_sampled_by_the_version_it_trains(events, groups_per_step):
    model = Model(scheduler(0, groups_per_step))
    for name, pick in events:
        getattr(model, name)(pick)
        assert all(started == model.version for started in model.running.values())
        assert all(g.oldest_version == model.version for g in model.ready) or model.version < model.formed
