"""Waiting for a condition on state that several coroutines of one event loop change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Change:
    """Everyone who waits looks again whenever something may have changed.

    Example:
        >>> change = Change()
        >>> asyncio.run(change.until(lambda: True))
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def until(self, ready: Callable[[], bool]) -> None:
        """Return once `ready()`; whoever changes what it reads must `notify`."""
        while not ready():
            await self._event.wait()
