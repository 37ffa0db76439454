"""Queues: bounded, in order, and able to say how full they are."""

from __future__ import annotations

import asyncio

from prl.dispatch.buffer import BoundedQueue, GroupBuffer
from prl.types import Group, TaskRef


def group(group_id: int) -> Group:
    task = TaskRef(environment="toy", split="train", index=group_id)
    return Group(group_id=group_id, task=task, attempt=0, started_version=0, rollouts=())


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_entries_leave_in_the_order_in_which_they_came():
    async def body() -> None:
        queue: BoundedQueue[int] = BoundedQueue("numbers", 3)
        for number in range(3):
            await queue.put(number)
        assert [await queue.get() for _ in range(3)] == [0, 1, 2]

    asyncio.run(body())


def test_put_waits_for_room():
    async def body() -> None:
        queue: BoundedQueue[int] = BoundedQueue("numbers", 1)
        await queue.put(0)
        async with asyncio.TaskGroup() as tasks:
            second = tasks.create_task(queue.put(1))
            await settle()
            assert not second.done()
            assert await queue.get() == 0
        assert queue.statistics().waiting == 1

    asyncio.run(body())


def test_room_means_that_put_does_not_wait():
    async def body() -> None:
        queue: BoundedQueue[int] = BoundedQueue("numbers", 1)
        queue.offer(0)
        async with asyncio.TaskGroup() as tasks:
            room = tasks.create_task(queue.room())
            await settle()
            assert not room.done()
            await queue.get()

    asyncio.run(body())


def test_offer_refuses_when_full_and_counts_it():
    async def body() -> None:
        queue: BoundedQueue[int] = BoundedQueue("numbers", 2)
        assert [queue.offer(n) for n in range(4)] == [True, True, False, False]
        await queue.get()
        statistics = queue.statistics()
        assert (statistics.name, statistics.capacity) == ("numbers", 2)
        assert (statistics.waiting, statistics.passed, statistics.refused) == (1, 1, 2)

    asyncio.run(body())


def test_a_closed_queue_gives_what_is_left_and_then_none():
    async def body() -> None:
        queue: BoundedQueue[int] = BoundedQueue("numbers", 2)
        queue.offer(4)
        queue.close()
        assert [await queue.get(), await queue.get()] == [4, None]

    asyncio.run(body())


def test_closing_wakes_who_waits():
    async def body() -> None:
        queue: BoundedQueue[int] = BoundedQueue("numbers", 2)
        async with asyncio.TaskGroup() as tasks:
            getter = tasks.create_task(queue.get())
            await settle()
            queue.close()
        assert getter.result() is None

    asyncio.run(body())


async def take(buffer: GroupBuffer, select, admit) -> list[Group]:
    """What the dispatcher does for a batch."""
    while True:
        await buffer.until(select)
        if groups := buffer.take_now(select, admit):
            return groups


def lowest(count: int):
    """A scheduler's `select` that takes the oldest groups."""
    return lambda ready: ready[:count] if len(ready) >= count else []


def test_a_selection_that_waits_for_something_else_is_asked_again():
    async def body() -> None:
        buffer = GroupBuffer(8)
        outstanding = {1}
        async with asyncio.TaskGroup() as tasks:
            taking = tasks.create_task(
                take(buffer, lambda ready: [] if outstanding else lowest(1)(ready), lambda group: True)
            )
            await buffer.put(group(2))
            await settle()
            assert not taking.done()
            outstanding.clear()
            buffer.reconsider()
        assert [g.group_id for g in taking.result()] == [2]

    asyncio.run(body())


def test_a_step_takes_the_lowest_ids_once_there_are_enough():
    async def body() -> None:
        buffer = GroupBuffer(8)
        async with asyncio.TaskGroup() as tasks:
            taking = tasks.create_task(take(buffer, lowest(3), lambda group: True))
            for group_id in (5, 2):
                await buffer.put(group(group_id))
            await settle()
            assert not taking.done()
            await buffer.put(group(9))
        assert [g.group_id for g in taking.result()] == [2, 5, 9]
        for group_id in (7, 1, 4):
            await buffer.put(group(group_id))
        assert [g.group_id for g in await take(buffer, lowest(2), lambda group: True)] == [1, 4]
        assert len(buffer) == 1
        assert buffer.statistics().passed == 5

    asyncio.run(body())


def test_groups_that_are_refused_leave_and_are_waited_for_again():
    async def body() -> None:
        buffer = GroupBuffer(8)
        refused: list[int] = []

        def even(candidate: Group) -> bool:
            if candidate.group_id % 2:
                refused.append(candidate.group_id)
            return candidate.group_id % 2 == 0

        async with asyncio.TaskGroup() as tasks:
            taking = tasks.create_task(take(buffer, lowest(2), even))
            for group_id in (0, 1, 3):
                await buffer.put(group(group_id))
            await settle()
            assert not taking.done()
            await buffer.put(group(4))
        assert [g.group_id for g in taking.result()] == [0, 4]
        assert refused == [1, 3]
        assert len(buffer) == 0

    asyncio.run(body())


def test_a_full_buffer_makes_arrivals_wait():
    async def body() -> None:
        buffer = GroupBuffer(2)
        async with asyncio.TaskGroup() as tasks:
            arrivals = [tasks.create_task(buffer.put(group(n))) for n in range(3)]
            await settle()
            assert [arrival.done() for arrival in arrivals] == [True, True, False]
            await take(buffer, lowest(1), lambda group: True)
        assert len(buffer) == 2

    asyncio.run(body())
