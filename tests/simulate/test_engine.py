"""Processor sharing, by hand: a decoding step of n sequences lasts 1 + n seconds."""

from __future__ import annotations

import pytest
from prl.simulate.cluster import Cluster
from prl.simulate.engine import Decoding, SimulatedEngine
from prl.simulate.workload import RolloutPlan


def engine(slots: int = 8) -> SimulatedEngine:
    cluster = Cluster(
        engines=1,
        slots=slots,
        decode_base=1.0,
        decode_per_sequence=1.0,
        step_base=0.0,
        step_per_token=0.0,
        publish=0.0,
    )
    return SimulatedEngine(cluster, version=0)


def sequence(tokens: int, group: int = 0) -> Decoding:
    return Decoding(group, RolloutPlan(tokens, 0.0, False))


def test_more_sequences_take_longer_steps() -> None:
    alone = engine()
    alone.add(0.0, [sequence(10)])
    assert alone.next_end() == 20.0
    shared = engine()
    shared.add(0.0, [sequence(10), sequence(10)])
    assert shared.next_end() == 30.0


def test_a_sequence_that_joins_slows_the_others_down_and_one_that_ends_speeds_them_up() -> None:
    one, first, second = engine(), sequence(10), sequence(10)
    one.add(0.0, [first])
    one.add(10.0, [second])  # first has 5 tokens
    assert one.next_end() == 25.0
    assert one.end(25.0) == [first]
    assert one.next_end() == 35.0  # second has 5 tokens, and two seconds for each of the others
    assert one.end(35.0) == [second]
    assert one.next_end() is None
    assert one.busy_seconds == 35.0
    assert one.slot_seconds == 50.0


def test_what_finds_no_slot_waits() -> None:
    one, first, second = engine(slots=1), sequence(5), sequence(3)
    one.add(0.0, [first, second])
    assert (one.running, len(one.waiting)) == (1, 1)
    assert one.end(10.0) == [first]
    assert (one.running, len(one.waiting)) == (1, 0)
    assert one.next_end() == 16.0
    one.end(16.0)
    one.settle(20.0)
    assert one.queue_seconds == 10.0
    assert one.busy_seconds == 16.0


def test_tokens_carry_the_version_that_sampled_them() -> None:
    one, old, new = engine(), sequence(10), sequence(4)
    one.add(0.0, [old])
    one.commit(7.0, 1)  # 3 tokens are whole, the fourth is half done
    one.commit(12.0, 2)  # 6 tokens
    one.end(20.0)
    assert one.tokens_by_version(old) == [(0, 3), (1, 3), (2, 4)]
    one.commit(21.0, 3)
    one.add(22.0, [new])
    one.end(30.0)
    assert one.tokens_by_version(new) == [(3, 4)]


def test_a_version_that_sampled_nothing_of_a_sequence_is_not_in_it() -> None:
    one, late = engine(), sequence(4)
    one.add(0.0, [late])
    one.commit(1.0, 1)  # half a token
    one.commit(1.5, 2)
    one.end(8.0)
    assert one.tokens_by_version(late) == [(2, 4)]


def test_aborted_sequences_free_their_slots_and_say_what_they_had() -> None:
    one, first, second, third = engine(slots=2), sequence(10), sequence(10), sequence(10)
    one.add(0.0, [first, second, third])
    assert one.abort(9.0, [first, third]) == 3
    assert (one.running, len(one.waiting)) == (1, 0)
    assert one.next_end() == 23.0
    assert one.abort(9.0, [first]) == 0
    assert one.end(23.0) == [second]


def test_an_announced_end_is_void_after_a_change() -> None:
    one = engine()
    one.add(0.0, [sequence(10)])
    ticket = one.ticket
    assert one.next_end() == 20.0
    assert one.ticket == ticket
    one.commit(1.0, 1)
    assert one.ticket != ticket


def test_rounding_never_leaves_a_sequence_just_short() -> None:
    one = engine(slots=64)
    time, ended = 0.0, 0
    for joined in range(200):
        one.add(time, [sequence(3 + joined % 7)])
        time = one.next_end() or time
        ended += len(one.end(time))
    while (end := one.next_end()) is not None:
        assert end >= time
        time = end
        batch = one.end(time)
        assert batch
        ended += len(batch)
    assert ended == 200
    assert one.running == 0


def test_the_cluster_counts_in_seconds() -> None:
    cluster = Cluster(
        engines=1,
        slots=1,
        decode_base=0.02,
        decode_per_sequence=0.001,
        step_base=2.0,
        step_per_token=0.01,
        publish=0.0,
    )
    assert cluster.decode_step(10) == pytest.approx(0.03)
    assert cluster.train_step(100) == pytest.approx(3.0)
