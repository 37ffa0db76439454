"""The queues of the controller: bounded, named, and able to say how full they are.

`GroupBuffer` holds admitted groups until a step takes the oldest ones; `BoundedQueue` is first in, first out. A full
queue makes its producer wait (`put`) or says no (`offer`): that is the controller's back-pressure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import attrs

from prl.dispatch.change import Change
from prl.types import Group

T = TypeVar("T")


@attrs.frozen(kw_only=True)
class QueueStatistics:
    """How full a queue is, and what went through it."""

    name: str
    capacity: int
    waiting: int
    passed: int
    """Entries taken out so far."""
    refused: int
    """Entries offered while it was full."""


class BoundedQueue(Generic[T]):
    """First in, first out, at most `capacity` entries.

    Example:
        >>> queue = BoundedQueue("letters", capacity=1)
        >>> queue.offer("a"), queue.offer("b"), queue.statistics().refused
        (True, False, 1)
    """

    def __init__(self, name: str, capacity: int) -> None:
        self._name = name
        self._capacity = capacity
        self._entries: deque[T] = deque()
        self._change = Change()
        self._closed = False
        self._passed = 0
        self._refused = 0

    def offer(self, entry: T) -> bool:
        """Put without waiting; False when there is no room."""
        if len(self._entries) >= self._capacity:
            self._refused += 1
            return False
        self._entries.append(entry)
        self._change.notify()
        return True

    async def put(self, entry: T) -> None:
        await self.room()
        self._entries.append(entry)
        self._change.notify()

    async def room(self) -> None:
        """Wait until an entry would fit; a single producer may then `put` without waiting."""
        await self._change.until(lambda: len(self._entries) < self._capacity)

    async def get(self) -> T | None:
        """The oldest entry; None once the queue is closed and empty."""
        await self._change.until(lambda: bool(self._entries) or self._closed)
        if not self._entries:
            return None
        self._passed += 1
        self._change.notify()
        return self._entries.popleft()

    def close(self) -> None:
        """Nothing will be put any more: who waits for an entry gets None when none is left."""
        self._closed = True
        self._change.notify()

    def statistics(self) -> QueueStatistics:
        return QueueStatistics(
            name=self._name,
            capacity=self._capacity,
            waiting=len(self._entries),
            passed=self._passed,
            refused=self._refused,
        )


class GroupBuffer:
    """Admitted groups by id, at most `capacity` of them."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._groups: dict[int, Group] = {}
        self._change = Change()
        self._passed = 0

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def groups(self) -> list[Group]:
        return list(self._groups.values())

    async def put(self, group: Group) -> None:
        await self.room()
        self.add(group)

    async def room(self) -> None:
        """Wait until there is room for a group."""
        await self._change.until(lambda: len(self._groups) < self._capacity)

    def add(self, group: Group) -> None:
        """Put a group for which there is room."""
        self._groups[group.group_id] = group
        self._change.notify()

    async def until(self, select: Callable[[list[int]], Sequence[int]]) -> None:
        """Wait until `select` chooses any among the ids that are ready (ascending)."""
        await self._change.until(lambda: bool(select(sorted(self._groups))))

    def take_now(self, select: Callable[[list[int]], Sequence[int]], admit: Callable[[Group], bool]) -> list[Group]:
        """The groups that `select` chooses among those that `admit` accepts now; none when it chooses none.

        Groups that `admit` refuses leave the buffer; what becomes of them is the caller's business.
        """
        self._keep(admit)
        return self._remove(select(sorted(self._groups)))

    def reconsider(self) -> None:
        """Something beside the buffer changed that `select` looks at."""
        self._change.notify()

    def _keep(self, admit: Callable[[Group], bool]) -> None:
        self._groups = {group_id: group for group_id, group in self._groups.items() if admit(group)}
        self._change.notify()

    def _remove(self, group_ids: Sequence[int]) -> list[Group]:
        taken = [self._groups.pop(group_id) for group_id in group_ids]
        self._passed += len(taken)
        self._change.notify()
        return taken

    def statistics(self) -> QueueStatistics:
        return QueueStatistics(
            name="ready", capacity=self._capacity, waiting=len(self._groups), passed=self._passed, refused=0
        )
