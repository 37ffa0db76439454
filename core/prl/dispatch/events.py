"""Who is told what happens: plugins with lifecycle hooks, and trackers. Neither can stop a run by failing.

Hooks are called at once, in the order of the config's `plugins`; trackers from one loop, in a thread, fed through a
bounded queue. Whoever fails three times in a row is left out from then on. The exception is a tracker that cannot
start: that is a mistake in the config, and worth ending the run for before it has cost anything.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from prl.dispatch.buffer import BoundedQueue, QueueStatistics
from prl.errors import PrlError, RunError
from prl.providers import MetricTracker
from prl.types import Group

log = logging.getLogger(__name__)

_FAILURES = 3
_BACKLOG = 256

Implementations = Callable[[str], Sequence[tuple[str, Callable[..., None]]]]
"""Name of a lifecycle hook -> (plugin, function) pairs, in order."""


class LifecycleHooks:
    """Calls hooks, each implementation isolated from the others.

    Example:
        >>> hooks = LifecycleHooks(composition.hooks.implementations)
        >>> hooks.call("prl_checkpoint_saved", step=10, path=path)
    """

    def __init__(self, implementations: Implementations) -> None:
        self._implementations = implementations
        self._failures: Counter[tuple[str, str]] = Counter()

    def call(self, hook: str, **arguments: Any) -> None:
        for plugin, function in self._implementations(hook):
            if self._failures[plugin, hook] < _FAILURES:
                self._call(plugin, hook, functools.partial(function, **arguments))

    def _call(self, plugin: str, hook: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:
            self._failures[plugin, hook] += 1
            off = "; it is switched off" if self._failures[plugin, hook] == _FAILURES else ""
            log.exception("plugin %s failed in %s%s", plugin, hook, off)
        else:
            self._failures[plugin, hook] = 0


@attrs.frozen
class _Call:
    method: str
    arguments: tuple[Any, ...]


class Trackers:
    """Feeds the run's trackers without ever waiting for them; what does not fit into the queue is left out."""

    def __init__(self, trackers: Sequence[tuple[str, MetricTracker]]) -> None:
        self._trackers = tuple(trackers)
        """(name of the provider, tracker); a name may occur twice."""
        self._failures: Counter[int] = Counter()
        self._queue: BoundedQueue[_Call] = BoundedQueue("trackers", _BACKLOG)

    async def start(self) -> None:
        """Start all of them; RunError names the one that cannot."""
        for name, tracker in self._trackers:
            try:
                await asyncio.to_thread(tracker.start)
            except PrlError:
                raise
            except Exception as error:
                raise RunError(f"tracker {name} cannot start: {error}") from error

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._queue.offer(_Call("log", (step, metrics)))

    def groups(self, step: int, groups: Sequence[Group]) -> None:
        self._queue.offer(_Call("groups", (step, groups)))

    def close(self) -> None:
        """Nothing more will come; `run` ends when everything was passed on."""
        self._queue.close()

    async def run(self) -> None:
        while (call := await self._queue.get()) is not None:
            await asyncio.to_thread(self._tell, call)

    async def finish(self, error: BaseException | None) -> None:
        await asyncio.to_thread(self._tell, _Call("finish", (error,)))

    def _tell(self, call: _Call) -> None:
        for number, (name, tracker) in enumerate(self._trackers):
            if self._failures[number] >= _FAILURES and call.method != "finish":
                continue
            try:
                getattr(tracker, call.method)(*call.arguments)
            except Exception:
                self._failures[number] += 1
                off = "; it is left out from now on" if self._failures[number] == _FAILURES else ""
                log.exception("tracker %s failed in %s%s", name, call.method, off)
            else:
                self._failures[number] = 0

    def statistics(self) -> QueueStatistics:
        return self._queue.statistics()
