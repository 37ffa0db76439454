"""The loop, by hand: one group a step, ten seconds to generate, five to train, two to publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import pytest
from prl.compose.config import RolloutSection
from prl.errors import RunError
from prl.providers import Drop, InFlight, Pipeline, RolloutScheduler
from prl.simulate.cluster import Cluster
from prl.simulate.loop import Simulation
from prl.simulate.workload import EmpiricalLengths, LognormalSeconds, Workload
from prl.types import Group
from prl_bounded_staleness.scheduler import BoundedStaleness

CLUSTER = Cluster(
    engines=1, slots=8, decode_base=1.0, decode_per_sequence=0.0, step_base=5.0, step_per_token=0.0, publish=2.0
)
ROLLOUTS = RolloutSection(groups_per_step=1, group_size=1)


def workload(*lengths: int, latency: float = 0.0, failure: float = 0.0) -> Workload:
    """Every group has one of these lengths."""
    return Workload(
        lengths=EmpiricalLengths(groups=tuple((length,) for length in lengths)),
        latency=LognormalSeconds(mean=latency, sigma=0.0),
        failure=failure,
    )


def bounded(max_staleness: int, groups_per_step: int = 1) -> Callable[[Any], RolloutScheduler]:
    return lambda clock: BoundedStaleness(max_staleness=max_staleness, groups_per_step=groups_per_step)


def simulation(
    build: Callable[[Any], RolloutScheduler],
    work: Workload,
    *,
    rollouts: RolloutSection = ROLLOUTS,
    cluster: Cluster = CLUSTER,
    steps: int = 10,
) -> Simulation:
    return Simulation(build, rollouts=rollouts, workload=work, cluster=cluster, steps=steps)


def test_synchronous() -> None:
    """Generate, train, publish, one after the other; the last step need not be published."""
    loop = simulation(bounded(0), workload(10))
    loop.run()
    figures = loop.figures()
    assert figures.seconds == 10 * 17.0 - 2.0
    assert figures.tokens_per_second == 100 / 168.0
    assert figures.idle_trainer == pytest.approx(1 - 50 / 168)
    assert figures.idle_engine == pytest.approx(1 - 100 / 168)
    assert figures.staleness == {0: 1.0}
    assert (figures.length_issued, figures.length_trained, figures.length_dropped) == (10.0, 10.0, None)


def test_one_step_ahead() -> None:
    """Both groups of version 0 are done at 10 s: one is trained until 15 s, the other, formed ahead, until 20 s.

    A third starts at 17 s, when version 1 is served. Version 2 is served at 22 s and samples its second half; it is
    trained from 27 s on, at version 2: of its tokens five are of staleness 1, five of staleness 0.
    """
    loop = simulation(bounded(1), workload(10), steps=3)
    loop.run()
    figures = loop.figures()
    assert figures.seconds == 32.0
    assert figures.staleness == {0: 0.5, 1: 0.5}
    assert figures.staleness_mean == 0.5
    assert figures.idle_trainer == pytest.approx(1 - 15 / 32)


def test_environment_seconds_hold_no_slot() -> None:
    loop = simulation(bounded(0), workload(10, latency=4.0), steps=1)
    loop.run()
    assert loop.figures().seconds == pytest.approx(19.0)
    assert loop.figures().idle_engine == pytest.approx(9 / 19)


def test_a_rollout_may_span_versions() -> None:
    """A long group is decoded while a short one is trained and published; its tokens carry both versions."""
    rollouts = attrs.evolve(ROLLOUTS, groups_per_step=1)
    loop = simulation(bounded(2), workload(10, 40), rollouts=rollouts, steps=20)
    loop.run()
    figures = loop.figures()
    assert set(figures.staleness) <= {0, 1, 2}
    assert figures.staleness[2] > 0
    assert sum(figures.staleness.values()) == pytest.approx(1.0)


def test_a_group_that_takes_too_long_is_tried_again_and_given_up() -> None:
    rollouts = attrs.evolve(ROLLOUTS, timeout=30.0, retries=2)
    loop = simulation(bounded(0), workload(10, 40), rollouts=rollouts, steps=20)
    loop.run()
    figures = loop.figures()
    assert figures.given_up > 0
    assert figures.dropped == {"timeout": 3 * figures.given_up}
    assert figures.tokens_wasted == pytest.approx(90 * figures.given_up / (90 * figures.given_up + 200))
    assert (figures.length_trained, figures.length_dropped) == (10.0, 40.0)


@pytest.mark.parametrize(("size", "needed"), [(1, 1), (4, 2)])
def test_a_group_needs_two_rollouts_to_compare(size: int, needed: int) -> None:
    rollouts = attrs.evolve(ROLLOUTS, group_size=size)
    sizes: list[int] = []
    loop = simulation(lambda clock: Watching(sizes), workload(10, failure=0.5), rollouts=rollouts, steps=40)
    loop.run()
    assert min(sizes) == needed
    assert max(sizes) == size
    assert set(loop.figures().dropped) == {"environment"}


def test_on_publish_cuts_what_the_scheduler_names() -> None:
    """A long group that short ones overtook is cut, for good where there are no retries: trained groups are shorter."""
    rollouts = attrs.evolve(ROLLOUTS, retries=0)
    loop = simulation(bounded(1), workload(1, 500), rollouts=rollouts, steps=20)
    loop.run()
    figures = loop.figures()
    assert figures.dropped == {"stale": figures.given_up}
    assert figures.length_dropped == 500.0
    assert figures.length_bias < 0.0 < figures.tokens_wasted


def test_engines_share_the_groups() -> None:
    cluster = attrs.evolve(CLUSTER, engines=2, slots=1)
    rollouts = attrs.evolve(ROLLOUTS, groups_per_step=2)
    loop = simulation(bounded(0, groups_per_step=2), workload(10), rollouts=rollouts, cluster=cluster, steps=1)
    loop.run()
    assert loop.figures().seconds == 15.0
    assert loop.figures().queues["slots"] == 0.0


def test_queues_are_averages_over_time() -> None:
    rollouts = attrs.evolve(ROLLOUTS, groups_per_step=2)
    cluster = attrs.evolve(CLUSTER, slots=1)
    loop = simulation(bounded(0, groups_per_step=2), workload(10), rollouts=rollouts, cluster=cluster, steps=1)
    loop.run()
    assert loop.figures().seconds == 25.0
    assert loop.figures().queues == {
        "batches": 0.0,
        "ready": pytest.approx(10 / 25),
        "running": pytest.approx(30 / 25),
        "slots": pytest.approx(10 / 25),
    }


def test_the_scheduler_is_on_the_virtual_clock() -> None:
    started: list[float] = []

    class Timed(Watching):
        def on_publish(self, version: int, in_flight: Sequence[InFlight]) -> Sequence[Drop]:
            started.append(clocks[0]())
            return ()

    clocks: list[Callable[[], float]] = []

    def build(clock: Callable[[], float]) -> RolloutScheduler:
        clocks.append(clock)
        return Timed([])

    simulation(build, workload(10), steps=3).run()
    assert started == [17.0, 34.0]


def test_everything_that_a_publication_cuts_is_tried_again() -> None:
    """Version 1 is served at 17 s, while three of four groups decode: they start anew and are trained."""

    class Fickle(Watching):
        def capacity(self, pipeline: Pipeline) -> int:
            return 4 - pipeline.ready - pipeline.running

        def on_publish(self, version: int, in_flight: Sequence[InFlight]) -> Sequence[Drop]:
            cut = in_flight if version == 1 else ()
            return [Drop(group_id=group.group_id, reason="fickle") for group in cut]

    cluster = attrs.evolve(CLUSTER, slots=1)
    loop = simulation(lambda clock: Fickle([]), workload(10), cluster=cluster, steps=4)
    loop.run()
    assert loop.figures().dropped == {"fickle": 3}
    assert (loop.figures().groups_trained, loop.figures().given_up) == (4, 0)
    assert loop.state_dict()["feed"]["issued"] == 4
    assert loop.figures().seconds == 17.0 + 3 * 10.0 + 5.0


def test_a_restored_simulation_has_everything_to_try_again() -> None:
    rollouts = attrs.evolve(ROLLOUTS, groups_per_step=4)
    loop = simulation(bounded(1, groups_per_step=4), workload(10, 30, 90), rollouts=rollouts)
    loop.run(until=2)
    state = loop.state_dict()
    issued = sorted(issue["group_id"] for issue in state["feed"]["outstanding"])
    restored = Simulation(
        bounded(1, groups_per_step=4),
        rollouts=rollouts,
        workload=workload(10),
        cluster=CLUSTER,
        steps=1,
        state=state,
    )
    assert issued
    assert sorted(restored.outstanding) == issued
    assert (restored.trained, restored.served, restored.formed) == (2, 2, 2)


def test_a_scheduler_that_starts_nothing_is_found_out() -> None:
    class Idle(Watching):
        def capacity(self, pipeline: Pipeline) -> int:
            return 0

    with pytest.raises(RunError, match="the scheduler starts nothing"):
        simulation(lambda clock: Idle([]), workload(10)).run()


def test_a_run_that_only_drops_is_found_out() -> None:
    with pytest.raises(RunError, match="64 groups were dropped, the last as 'environment'"):
        simulation(bounded(0), workload(10, failure=1.0)).run()


class Watching:
    """Synchronous, one group a step; notes how many rollouts each admitted group has."""

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes

    def capacity(self, pipeline: Pipeline) -> int:
        return 1 - pipeline.ready - pipeline.running - (pipeline.next_version - pipeline.version)

    def admit(self, group: Group, version: int) -> Drop | None:
        self._sizes.append(len(group.rollouts))
        return None

    def select(self, ready: Sequence[int], outstanding: Sequence[int], count: int) -> Sequence[int]:
        return ready[:count]

    def on_publish(self, version: int, in_flight: Sequence[InFlight]) -> Sequence[Drop]:
        return ()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass
