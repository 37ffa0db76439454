"""The limit of the scheduler `adaptive`: over stories recorded from real servers, and rule by rule."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import attrs
import pytest
from prl.compose.compose import compose
from prl.providers import EngineLoad, InFlight, LoadAwareScheduler, Pipeline
from prl_adaptive.limit import Limit
from prl_adaptive.scheduler import Adaptive
from prl_bounded_staleness.scheduler import BoundedStaleness

ROOT = Path(__file__).parents[2]
CALM = EngineLoad(
    engine=0, running=8, waiting=0, kv_usage=0.3, preemptions=0, sequences=64, kv_tokens=32768, length=512
)


def load(engine: int = 0, **changes: float) -> EngineLoad:
    return attrs.evolve(CALM, engine=engine, **changes)


@attrs.define
class Polls:
    """A limit that is told every five seconds; `arrived` grows with what it is told."""

    limit: Limit
    at: float = 0.0
    arrived: int = 0

    def tell(self, *loads: EngineLoad, running: int, arrived: int = 0, seconds: float = 5.0) -> tuple[int, int | None]:
        """(limit, what the pool is cut to)."""
        self.at, self.arrived = self.at + seconds, self.arrived + arrived
        cut = self.limit.observe(self.at, loads, running=running, arrived=self.arrived, group_size=8)
        return self.limit.value, cut


def polls(start: int = 100, most: int = 1024) -> Polls:
    """Of a limit that has heard of calm engines once."""
    made = Polls(Limit(start=start, most=most))
    made.tell(load(), running=0)
    return made


# --- the rules --------------------------------------------------------------------------------------------------------
def test_nothing_starts_before_the_engines_were_heard() -> None:
    limit = Limit(start=0, most=64)
    assert limit.value == 0
    assert limit.observe(0.0, [], running=0, arrived=0, group_size=8) is None
    assert limit.value == 0


@pytest.mark.parametrize(("kv_tokens", "sequences", "groups"), [(32768, 64, 16), (16384, 64, 8), (32768, 16, 4)])
def test_it_starts_with_what_has_room_at_full_length(kv_tokens: float, sequences: float, groups: int) -> None:
    """Two engines, groups of 8 rollouts of at most 512 tokens."""
    limit = Limit(start=0, most=64)
    loads = [load(engine, kv_tokens=kv_tokens, sequences=sequences) for engine in (0, 1)]
    limit.observe(0.0, loads, running=0, arrived=0, group_size=8)
    assert limit.value == groups


def test_it_grows_by_a_quarter_a_turnover_where_it_holds_back() -> None:
    told = polls()
    assert told.tell(load(), running=100, arrived=50) == (111, None)  # 100 * 1.25 ** 0.5
    assert told.tell(load(), running=111, arrived=400) == (139, None)  # one turnover a poll at most
    assert told.tell(load(), running=111, arrived=100) == (139, None)  # the staleness bound holds back, not the limit


@pytest.mark.parametrize("change", [{"kv_usage": 0.61}, {"waiting": 1.0}])
def test_it_does_not_grow_on_engines_that_are_nearly_full(change: dict[str, float]) -> None:
    told = polls()
    assert told.tell(load(**change), running=100, arrived=100) == (100, None)


def test_it_does_not_grow_on_old_news() -> None:
    told = polls()
    assert told.tell(load(), running=100, arrived=100, seconds=16.0) == (100, None)
    assert told.tell(load(), running=100, arrived=100) == (125, None)


def test_a_small_limit_grows_too() -> None:
    told = polls(start=3)
    course = [told.tell(load(), running=running, arrived=running)[0] for running in (3, 3, 4, 4, 5)]
    assert course == [3, 4, 5, 7, 7]


def test_full_caches_shrink_the_pool_and_overflowing_ones_are_cut_at_once() -> None:
    told = polls()
    assert told.tell(load(kv_usage=0.85), running=100) == (82, None)  # 100 * 0.7 / 0.85
    assert told.tell(load(kv_usage=0.96), running=100) == (72, 72)
    assert told.tell(load(kv_usage=0.75), running=72, arrived=72) == (72, None)


def test_preemptions_cut_once_until_the_pool_has_shrunk_and_harder_the_second_time() -> None:
    told = polls()
    assert told.tell(load(preemptions=1), running=100) == (80, None)
    assert told.tell(load(preemptions=2), running=90) == (80, None)  # it has not shrunk yet
    assert told.tell(load(preemptions=2), running=80) == (80, None)  # quiet: the cut was enough
    assert told.tell(load(preemptions=3), running=80) == (40, None)
    for _ in range(12):
        told.tell(load(preemptions=3), running=30)
    assert told.tell(load(preemptions=4), running=40) == (32, None)  # forgiven


def test_a_long_queue_cuts_when_it_stays() -> None:
    told = polls()
    crowd = load(running=64, waiting=40)
    course = [told.tell(crowd, running=100)[0] for _ in range(7)]
    assert course == [100, 100, 100, 100, 100, 90, 90]
    assert [told.tell(load(running=64, waiting=20), running=80)[0] for _ in range(7)] == [90] * 7


def test_a_cut_never_raises_the_limit_and_starts_from_what_runs() -> None:
    told = polls()
    assert told.tell(load(preemptions=1), running=10) == (8, None)
    assert told.tell(load(kv_usage=0.85, preemptions=1), running=400) == (8, None)


def test_engines_that_leave_and_join_change_it_in_proportion() -> None:
    told = Polls(Limit(start=90, most=1024))
    told.tell(load(0), load(1), load(2), running=0)
    assert told.tell(load(0), load(2), running=50) == (60, None)
    assert told.tell(running=50) == (60, None)  # nobody answers: nothing is known
    assert told.tell(load(0), load(1), load(2), running=50) == (90, None)


def test_an_engine_that_starts_again_has_preempted_nobody() -> None:
    told = polls()
    told.tell(load(preemptions=50), running=10)
    assert told.limit.value == 8
    assert told.tell(load(preemptions=0), running=8) == (8, None)


# --- recorded stories -------------------------------------------------------------------------------------------------
# Recorded by benchmarks/overload_stories.py: as many groups of 4 in flight as the story says, whatever a limit says.
def story(name: str) -> list[dict[str, Any]]:
    lines = (Path(__file__).parent / "overload" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def course(polls: Sequence[dict[str, Any]], *, start: int) -> tuple[list[tuple[int, int]], list[int]]:
    """([(limit, for how many polls)], [what the pool was cut to, when it was])."""
    limit, values, cuts = Limit(start=start, most=64), list[int](), list[int]()
    for poll in polls:
        loads = [EngineLoad(**said) for said in poll["loads"]]
        cut = limit.observe(poll["at"], loads, running=poll["running"], arrived=poll["arrived"], group_size=4)
        values.append(limit.value)
        cuts += [cut] if cut is not None else []
    return [(value, len(list(same))) for value, same in groupby(values)], cuts


def test_a_storm_of_preemptions_is_cut_to_what_fits() -> None:
    """48 sequences of up to 480 tokens in 8192: 718 preemptions in a minute. 16 have room at full length: 4 groups."""
    storm = story("storm")
    assert (storm[-1]["loads"][0]["preemptions"], storm[-1]["arrived"]) == (718, 123)
    assert course(storm, start=0)[0] == [(4, 19), (3, 32)]
    limits, cuts = course(storm, start=12)
    assert limits == [(12, 1), (8, 18), (6, 32)]
    assert cuts[0] == 8
    assert set(cuts) == {8, 9}


def test_a_queue_that_stays_is_cut_once_while_the_pool_does_not_shrink() -> None:
    """48 sequences for 8 places, nobody preempted, caches nearly empty: preemptions alone would see nothing."""
    queue = story("queue")
    assert max(poll["loads"][0]["kv_usage"] for poll in queue) < 0.05
    assert course(queue, start=12) == ([(12, 5), (10, 30)], [])


def test_an_engine_that_recovers_is_cut_again_only_by_a_new_queue() -> None:
    """The same queue, and again after the pool has emptied: the second cut is the harder one, if it comes soon."""
    queue = story("queue")
    again = [{**poll, "at": poll["at"] + 40.0, "arrived": poll["arrived"] + 60} for poll in queue]
    assert course([*queue, *again], start=12)[0] == [(12, 5), (10, 35), (9, 30)]
    soon = [*queue[:6], *queue[-3:], *queue[:8]]
    assert course(soon, start=12)[0] == [(12, 5), (10, 9), (5, 3)]


def test_a_calm_engine_bears_more_and_more() -> None:
    """Two groups in flight: the limit outgrows them, and stops where it is not what holds them back."""
    assert course(story("calm"), start=2) == ([(2, 2), (3, 2), (4, 7)], [])


def test_a_lost_engine_takes_its_share_along_until_it_is_back() -> None:
    calm = story("calm")
    both = [{**poll, "running": 0, "loads": [*poll["loads"], {**poll["loads"][0], "engine": 1}]} for poll in calm[:9]]
    lost = [*both[:3], *({**poll, "loads": poll["loads"][:1]} for poll in both[3:6]), *both[6:]]
    assert course(lost, start=20) == ([(20, 3), (10, 3), (20, 3)], [])


# --- with another scheduler -------------------------------------------------------------------------------------------
def scheduler(start: int) -> Adaptive:
    within = BoundedStaleness(max_staleness=1, groups_per_step=8)
    return Adaptive(within=within, limit=Limit(start=start, most=64), poll_seconds=5.0)


def pipeline(**changes: int) -> Pipeline:
    return Pipeline(**{"version": 4, "next_version": 4, "ready": 0, "running": 0, "group_size": 8, **changes})


def test_the_smaller_of_bound_and_limit_counts() -> None:
    small, large = scheduler(5), scheduler(50)
    for adaptive in (small, large):
        assert adaptive.capacity(pipeline()) == 0
        adaptive.observe(0.0, [load()], pipeline(), [])
    assert (small.capacity(pipeline()), small.capacity(pipeline(running=3))) == (5, 2)
    assert (large.capacity(pipeline()), large.capacity(pipeline(ready=4, running=9))) == (16, 3)


def test_the_youngest_are_cut() -> None:
    adaptive = scheduler(50)
    flying = [InFlight(group_id=i, started_version=4, started_at=float(at)) for i, at in enumerate([3, 1, 4, 1, 5])]
    drops = adaptive.observe(0.0, [load(kv_usage=1.0)], pipeline(running=5), flying)
    assert {drop.group_id: drop.reason for drop in drops} == {2: "overload", 4: "overload"}
    assert all(drop.retry for drop in drops)


def test_the_limit_survives_a_checkpoint_and_other_schedulers_checkpoints_are_taken() -> None:
    learned, fresh = scheduler(5), scheduler(50)
    learned.observe(0.0, [load()], pipeline(), [])
    fresh.load_state_dict(json.loads(json.dumps(learned.state_dict())))
    assert fresh.limit.value == 5
    fresh.load_state_dict(BoundedStaleness(max_staleness=1, groups_per_step=8).state_dict())
    assert fresh.limit.value == 5


def test_the_config_nests_any_scheduler() -> None:
    edits = ["type='adaptive'", "start=7", "within.type='windowed_fifo'", "within.max_staleness=3"]
    composition = compose(
        ROOT / "configs/spell_backward.toml",
        plugins="adaptive,windowed_fifo",
        overrides=[f"scheduler.{edit}" for edit in edits],
    )
    built = composition.build(composition.run.scheduler, 16, lambda: 0.0)
    assert isinstance(built, LoadAwareScheduler)
    assert built.within.max_staleness == composition.run.scheduler.max_staleness == 3  # type: ignore[attr-defined]
    assert composition.resolved["scheduler"]["within"]["type"] == "windowed_fifo"
    assert [path for path, _ in composition.sections() if "scheduler" in path] == ["scheduler", "scheduler.within"]
