"""Who may enter vLLM: so many sequences at one time, in the order they came, and nobody while weights change."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Door:
    """Lets `capacity` sequences in, first come first served, and nobody while it is closed."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._inside = 0
        self._opening = asyncio.Event()
        self._opening.set()
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._busy = 0.0
        self._since = 0.0

    @property
    def waiting(self) -> int:
        """Sequences that stand before it."""
        return sum(n for n, _ in self._queue)

    @property
    def busy_seconds(self) -> float:
        """Seconds in which somebody was inside."""
        return self._busy + (time.monotonic() - self._since if self._inside else 0.0)

    @asynccontextmanager
    async def inside(self, n: int) -> AsyncIterator[None]:
        n = min(n, self._capacity)
        await self._enter(n)
        try:
            yield
        finally:
            self._leave(n)

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """Those inside stay there."""
        self._opening.clear()
        try:
            yield
        finally:
            self._opening.set()
            self._admit()

    async def opened(self) -> None:
        """Wait until it is open."""
        await self._opening.wait()

    async def _enter(self, n: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((n, turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(n)
            else:
                self._queue.remove((n, turn))
                self._admit()
            raise

    def _leave(self, n: int) -> None:
        self._inside -= n
        if not self._inside:
            self._busy += time.monotonic() - self._since
        self._admit()

    def _admit(self) -> None:
        while self._opening.is_set() and self._queue and self._inside + self._queue[0][0] <= self._capacity:
            n, turn = self._queue.popleft()
            if not self._inside:
                self._since = time.monotonic()
            self._inside += n
            turn.set_result(None)
