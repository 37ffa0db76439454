"""A replay is equal to the run, event by event and column by column; or it says what differs first."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from prl.errors import RunError
from prl.ledger import event_log
from prl.ledger.events import Arrived, Continued, Cut, Dropped, Event, Issued, Taken, Trained, sentence
from prl.ledger.read import snapshot
from prl.messages import Failed, RunGroup, TrainStep
from prl.providers import Drop
from prl.replay.compare import Difference
from prl.replay.history import head, segments
from prl.replay.order import Report
from prl.types import Group
from prl_bounded_staleness import scheduler
from prl_bounded_staleness.scheduler import BoundedStaleness

from tests.dispatch.fakes import FakeEngine, FakeEnvironment, FakeRun, FakeTrainer, answer, toy_run
from tests.replay.doing_again import change, events, replay, write

WARMUP, STEPS = 2, 8
LAST = WARMUP + STEPS


def unlucky(request: RunGroup) -> Any:
    """Group 1 is lost once, 3 misses a rollout, 4 is never answered at first, 14 comes back too old at first."""
    first = request.attempt == 0
    match request.group_id:
        case 1 if first:
            return Failed(error="the environment has no such file")
        case 3:
            return answer(request, failed=1)
        case 4 if first:
            return None
        case 14 if first:
            return answer(request, version=0)
    return answer(request)


@pytest.fixture(scope="module")
def eventful(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    """A warm-up, two engines, two ranks, evaluations; groups that are lost, cut and refused."""
    run = FakeRun(
        tmp_path_factory.mktemp("eventful"),
        toy_run(
            warmup=WARMUP,
            steps=STEPS,
            max_staleness=2,
            engines=2,
            trainer={"ranks": 2},
            evaluation={"every": 4, "tasks": 3},
            checkpoints={"every": 3},
        ),
        environments=[FakeEnvironment(reply=unlucky)],
        engines=[FakeEngine(), FakeEngine()],
        trainers=[FakeTrainer(), FakeTrainer()],
    )
    run.go()
    return run


@pytest.fixture
def copy(eventful: FakeRun, tmp_path: Path) -> FakeRun:
    """The same run in a directory whose log a test may change."""
    shutil.copytree(eventful.path, tmp_path / "run")
    return FakeRun(tmp_path / "run", eventful.run, trainers=eventful.trainers)


def only(reports: list[Report]) -> Report:
    (report,) = reports
    return report


def difference(run: FakeRun) -> Difference:
    found = only(replay(run)).difference
    assert found is not None
    return found


# --- equal ------------------------------------------------------------------------------------------------------------
def test_an_eventful_run_is_equal_to_its_replay(eventful: FakeRun) -> None:
    told = events(eventful)
    assert {event.cut for event in told if isinstance(event, Dropped)} == {True, False}
    assert {event.admitted for event in told if isinstance(event, Arrived)} == {True, False}
    assert sum(isinstance(event, Taken) for event in told) == STEPS
    assert only(replay(eventful)) == Report(trained=LAST, weights=LAST - WARMUP + 1)


@pytest.mark.parametrize("until", [1, WARMUP, WARMUP + 3])
def test_until_a_step(eventful: FakeRun, until: int) -> None:
    report = only(replay(eventful, until=until))
    assert (report.trained, report.difference, report.error) == (until, None, "")


def test_the_ranks_are_given_the_same_batches_and_learning_rates(eventful: FakeRun) -> None:
    ranks: list[FakeTrainer] = []

    def remembered(version: int) -> FakeTrainer:
        ranks.append(FakeTrainer(version=version))
        return ranks[-1]

    replay(eventful, rank=remembered)
    for before, again in zip(eventful.trainers, ranks, strict=True):
        assert [order.learning_rate for order in again.steps] == [order.learning_rate for order in before.steps]
        assert [tokens(order) for order in again.steps] == [tokens(order) for order in before.steps]


def tokens(order: TrainStep) -> list[list[int]]:
    return [micro.tokens.tolist() for micro in order.batch.ranks[0]]


@attrs.define(kw_only=True)
class Fickle(BoundedStaleness):
    """Admits every third group when it arrives, and refuses it when a batch is formed."""

    asked: Counter[int] = attrs.field(factory=Counter)

    def admit(self, group: Group, version: int) -> Drop | None:
        self.asked[group.group_id] += 1
        if group.group_id % 3 == 1 and self.asked[group.group_id] == 2:
            return Drop(group_id=group.group_id, reason="second thoughts")
        return super().admit(group, version)


def test_groups_refused_when_a_batch_is_formed_are_refused_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(config: Any, groups_per_step: int, clock: Any) -> Fickle:
        return Fickle(max_staleness=config.max_staleness, groups_per_step=groups_per_step)

    monkeypatch.setattr(scheduler, "build", build)
    run = FakeRun(tmp_path, toy_run(steps=6, max_staleness=2))
    run.go()
    reasons = {event.group_id: event.reason for event in events(run) if isinstance(event, Dropped)}
    assert reasons.get(1) == reasons.get(4) == "second thoughts"
    assert only(replay(run)) == Report(trained=6, weights=6)


# --- different --------------------------------------------------------------------------------------------------------
def trained_in(run: FakeRun, step: int) -> int:
    """Id of a group that a step was trained on."""
    query = (
        "SELECT group_id FROM batches b JOIN members m ON m.batch = b.id JOIN issues i ON i.id = m.issue WHERE step = ?"
    )
    group_id: int = snapshot(run.run_dir.ledger).execute(query, (step,)).fetchone()[0]
    return group_id


def with_rollout(group_id: int, **changes: Callable[[Any], Any]) -> Callable[[Event], Event | None]:
    """The first rollout of a group that was admitted, with some of its fields changed."""

    def changed(event: Event) -> Event | None:
        if not (isinstance(event, Arrived) and event.admitted and event.group.group_id == group_id):
            return None
        first, *rest = event.group.rollouts
        other = attrs.evolve(first, **{name: change(getattr(first, name)) for name, change in changes.items()})
        return attrs.evolve(event, group=attrs.evolve(event.group, rollouts=(other, *rest)))

    return changed


def flip(column: np.ndarray) -> np.ndarray:
    """One bit of the last number's lowest byte."""
    flipped = column.copy()
    flipped.view(np.uint8)[-flipped.itemsize] ^= 1
    return flipped


def test_a_flipped_bit_of_a_log_probability_is_found_at_its_step(copy: FakeRun) -> None:
    step = 6
    change(copy, with_rollout(trained_in(copy, step), logprobs=flip))
    found = difference(copy)
    recorded = snapshot(copy.run_dir.ledger).execute("SELECT digest FROM batches WHERE step = 6").fetchone()[0]
    assert (found.step, found.what, found.recorded) == (step, "the batch", recorded)
    assert found.replayed != recorded
    assert "tokens or log-probabilities are not" in found.detail
    assert only(replay(copy, until=step - 1)) == Report(trained=step - 1, weights=step - WARMUP)


def test_another_reward_is_named(copy: FakeRun) -> None:
    group_id = trained_in(copy, 5)
    change(copy, with_rollout(group_id, reward=lambda reward: reward + 0.5))
    found = difference(copy)
    assert (found.step, found.what) == (5, "the batch")
    assert found.detail == f"rollout {group_id}.0: reward was 0.0, and is 0.5"


def other_decision(event: Event) -> Event | None:
    """Another decision than the controller's, in each kind of event that has one."""
    match event:
        case Issued(issue):
            return Issued(attrs.evolve(issue, attempt=issue.attempt + 1))
        case Arrived():
            return attrs.evolve(event, admitted=not event.admitted)
        case Dropped():
            return attrs.evolve(event, again=not event.again)
        case Taken(group_ids):
            return Taken(group_ids[:-1])
    return None


@pytest.mark.parametrize("kind", [Issued, Arrived, Dropped, Taken])
def test_another_decision_is_found(copy: FakeRun, kind: type) -> None:
    change(copy, lambda event: other_decision(event) if isinstance(event, kind) else None)
    found = difference(copy)
    assert found.what == "what the controller does"
    assert found.recorded != found.replayed
    assert WARMUP < found.step <= LAST


def test_a_group_that_a_broken_log_has_twice_is_found(copy: FakeRun) -> None:
    told = [event for event in events(copy) if isinstance(event, Arrived)]
    change(copy, lambda event: told[0] if sentence(event) == sentence(told[1]) else None)
    found = difference(copy)
    assert (found.what, found.replayed) == ("what the controller does", "nothing")


@pytest.mark.parametrize(("number", "next_one"), [(3, "nothing"), (8, "step 6 is trained")])
def test_a_step_that_is_not_the_next_is_found(copy: FakeRun, number: int, next_one: str) -> None:
    """A log that forgot how the batch of step 3 came to be, and one that has a later step in the place of step 6."""
    path = event_log.path_of(copy.run_dir, 1)
    entries = list(event_log.read(path))
    if number == 3:
        del entries[next(n for n, (_, event) in enumerate(entries) if isinstance(event, Taken))]
    else:
        entries = [
            (at, Trained(number) if event == Trained(6) else event) for at, event in entries if event != Trained(8)
        ]
    write(path, entries)
    found = difference(copy)
    assert found.what == "what the controller does"
    assert number != 8 or (found.recorded, found.replayed) == ("step 8 is trained", next_one)


def test_a_trainer_that_makes_other_weights_is_found(eventful: FakeRun) -> None:
    def rank(version: int) -> FakeTrainer:
        return Wrong(version=version)

    found = only(replay(eventful, rank=rank)).difference
    assert found is not None
    assert (found.step, found.what) == (7, "the weights it made")
    assert found.recorded != found.replayed


@attrs.define(eq=False)
class Wrong(FakeTrainer):
    """Publishes weights of its own after step 7."""

    def _done(self, order: TrainStep, *, publishes: bool) -> Any:
        done = super()._done(order, publishes=publishes)
        if done.manifest is None or done.step != 7:
            return done
        (part,) = done.manifest.parts
        (tensor,) = part.tensors
        spoilt = attrs.evolve(part, tensors=(attrs.evolve(tensor, checksum=tensor.checksum + 1),))
        other = attrs.evolve(done.manifest, parts=(spoilt,))
        return attrs.evolve(done, manifest=other)


# --- logs that end, or are damaged ------------------------------------------------------------------------------------
def ends(run: FakeRun) -> list[tuple[int, Event]]:
    """(bytes of the log up to and with it, event)"""
    position, found = len(event_log.MAGIC), []
    for at, event in event_log.read(event_log.path_of(run.run_dir, 1)):
        position += len(event_log.record(at, event))
        found.append((position, event))
    return found


@pytest.mark.parametrize("torn", [0, 3, 25])
def test_a_log_that_is_cut_short_is_replayed_as_far_as_it_goes(copy: FakeRun, torn: int) -> None:
    """Cut after step 6, exactly or some bytes into the next record."""
    path = event_log.path_of(copy.run_dir, 1)
    position = next(end for end, event in ends(copy) if repr(event) == "Trained(step=6)")
    path.write_bytes(path.read_bytes()[: position + torn])
    report = only(replay(copy))
    assert (report.trained, report.difference) == (6, None)
    assert report.error.endswith(
        f"ends after step 6, the ledger has steps up to {LAST}: steps 7 to {LAST} cannot be replayed"
    )
    assert only(replay(copy, until=6)).error == ""


def test_a_log_without_a_step_is_refused(copy: FakeRun) -> None:
    path = event_log.path_of(copy.run_dir, 1)
    path.write_bytes(path.read_bytes()[: ends(copy)[1][0] - 1])
    with pytest.raises(RunError, match="is cut short before its first step"):
        head(segments(copy.run_dir, None)[0].log)


def test_damage_in_the_middle_is_told_from_a_log_that_ends(copy: FakeRun) -> None:
    path = event_log.path_of(copy.run_dir, 1)
    content = bytearray(path.read_bytes())
    start = next(end for end, event in ends(copy) if repr(event) == "Trained(step=4)")
    content[start + 30] ^= 1
    path.write_bytes(content)
    report = only(replay(copy))
    assert (report.trained, report.difference) == (4, None)
    assert f"is damaged: the record at byte {start} is not what was written" in report.error


# --- several launches -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    """Terminated in step 6, and continued from the checkpoint of step 4, with groups that came with it."""
    run = FakeRun(
        tmp_path_factory.mktemp("resumed"),
        toy_run(steps=STEPS, max_staleness=3, checkpoints={"every": 2, "keep_last": 0}),
    )

    def end_in_step_six(order: TrainStep) -> None:
        if order.batch.step == 6:
            run.terminate()

    run.trainers = [FakeTrainer(before_step=end_in_step_six)]
    with pytest.raises(BaseException):  # noqa: B017, PT011 - a cancellation, as a signal's
        run.go()
    newest = max(int(path.name.removeprefix("step-")) for path in run.run_dir.checkpoints.glob("step-*[0-9]"))
    section = attrs.evolve(run.run.checkpoints, resume=str(run.run_dir.checkpoints / f"step-{newest}"))
    again = FakeRun(run.path, attrs.evolve(run.run, checkpoints=section), trainers=[FakeTrainer(version=newest)])
    again.go()
    return again


def test_every_launch_is_replayed_up_to_where_the_next_goes_on(resumed: FakeRun) -> None:
    first, second = segments(resumed.run_dir, None)
    assert (first.start, second.end) == (0, STEPS)
    assert first.end == second.start > 0
    assert any(isinstance(event, Arrived) and event.restored for event in events(resumed, launch=2))
    assert Cut(first.end) in events(resumed)
    reports = replay(resumed)
    assert [(report.trained, report.difference, report.error) for report in reports] == [
        (first.end, None, ""),
        (STEPS, None, ""),
    ]


def test_a_launch_that_began_in_another_state_than_the_cut_is_found(resumed: FakeRun, tmp_path: Path) -> None:
    shutil.copytree(resumed.path, tmp_path / "run")
    run = FakeRun(tmp_path / "run", resumed.run, trainers=resumed.trainers)

    def one_more(event: Event) -> Event | None:
        if not isinstance(event, Continued):
            return None
        issued = '"issued": '
        before, after = event.state.split(issued, 1)
        number, rest = after.split(",", 1)
        return attrs.evolve(event, state=f"{before}{issued}{int(number) + 1},{rest}")

    change(run, one_more, launch=2)
    report = replay(run)[0]
    assert report.difference is not None
    assert report.difference.what == "the feed of its checkpoint"
