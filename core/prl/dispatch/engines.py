"""The engines as the controller sees them: which serve, how loaded they are, how busy they were.

An engine that fails to answer is evicted: nothing new goes there, and what runs there is cut and tried elsewhere. It
serves again once publication has caught it up (`prl.weights.publish`). Knows nothing of tasks or steps.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal

import attrs

from prl.dispatch.change import Change
from prl.errors import InfrastructureError
from prl.ledger import facts
from prl.ledger.facts import FactSink
from prl.providers import EngineClient, EngineLoad

log = logging.getLogger(__name__)

_STATISTICS_TIMEOUT = 30.0  # seconds

Tell = Callable[[list[EngineLoad]], None]


@attrs.define(eq=False, kw_only=True)
class Attempt:
    """One try at a group, while it lasts."""

    size: int
    """Rollouts."""
    deadline: asyncio.Timeout
    cut_reason: str = ""

    def cut(self, reason: str) -> None:
        """End it now, as its deadline would; does nothing when it is ending already."""
        if not self.cut_reason and not self.deadline.expired():
            self.cut_reason = reason
            self.deadline.reschedule(asyncio.get_running_loop().time())


@attrs.define(eq=False, kw_only=True)
class Engine:
    """One engine, through all lives of its process.

    `serving`, `version` and `failures` are publication's to change, `attempts` placement's.
    """

    index: int
    url: str
    client: EngineClient
    kind: str = ""
    """`prefill`: it computes prompts for the others, who ask it themselves; it is given weights, but no groups."""
    version: int = -1
    """Newest version it has committed; -1 before the first."""
    serving: bool = False
    attempts: set[Attempt] = attrs.field(factory=set)
    """What runs on it."""
    absent: bool = False
    """Its process is gone, and no successor has come yet."""
    failures: int = 0
    """Updates in a row that failed."""
    busy: float | None = None
    """Share of the time between its last two reports in which it computed."""
    _reported_at: float = attrs.field(default=0.0, init=False)
    _busy_seconds: float = attrs.field(default=0.0, init=False)

    @property
    def rollouts(self) -> int:
        return sum(attempt.size for attempt in self.attempts)

    def report(self, busy_seconds: float, now: float) -> None:
        """Take in its total of seconds computed, read at `now`."""
        if self._reported_at and now > self._reported_at:
            share = (busy_seconds - self._busy_seconds) / (now - self._reported_at)
            self.busy = min(max(share, 0.0), 1.0)
        self._reported_at, self._busy_seconds = now, busy_seconds


class EnginePool:
    """All engines of a run.

    `watch` is a loop of the controller: it waits for `poll`, then asks every engine that serves for its statistics.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        change: Change,
        ledger: FactSink,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engines = tuple(engines)
        self.change = change
        """Notified when an engine starts or stops serving."""
        self._ledger = ledger
        self._clients = [engine.client for engine in self.engines]
        self._clock = clock
        self._poll_due = False

    @property
    def serving(self) -> list[Engine]:
        return [engine for engine in self.engines if engine.serving]

    @property
    def sampling(self) -> list[Engine]:
        """Those that serve and are given groups."""
        return [engine for engine in self.serving if engine.kind != "prefill"]

    async def choose(self) -> Engine:
        """The engine with the fewest rollouts among those that sample; waits until there is one."""
        await self.change.until(lambda: bool(self.sampling))
        return min(self.sampling, key=lambda engine: (engine.rollouts, engine.index))

    def evict(self, engine: Engine, reason: str) -> None:
        if engine.serving:
            log.warning("engine %d (%s) is evicted: %s", engine.index, engine.url, reason)
            self._tell(engine, "left", reason)
        engine.serving = False
        for attempt in engine.attempts:
            attempt.cut("engine")
        self.change.notify()

    def lose(self, index: int, reason: str) -> None:
        """Its process is gone: nothing is tried with it until there is another."""
        engine = self.engines[index]
        self.evict(engine, reason)
        engine.absent = True

    def replace(self, index: int, url: str, client: EngineClient) -> None:
        """Another process takes its place, without weights: publication catches it up."""
        engine = self.engines[index]
        self.evict(engine, "it was started again")
        self._clients.append(client)
        engine.url, engine.client = url, client
        engine.version, engine.failures, engine.absent = -1, 0, False
        self.change.notify()

    async def aclose(self) -> None:
        """Close every client there ever was."""
        for client in self._clients:
            await client.aclose()

    def rejoin(self, engine: Engine) -> None:
        if not engine.serving:
            log.info("engine %d (%s) serves version %d", engine.index, engine.url, engine.version)
            self._tell(engine, "joined")
        engine.serving = True
        self.change.notify()

    def committed(self, engine: Engine, version: int) -> None:
        """It holds that version now, and no other."""
        engine.version = version
        self._tell(engine, "committed")

    def failed(self, engine: Engine, error: InfrastructureError) -> None:
        """It missed an update: it is evicted until publication has caught it up."""
        engine.failures += 1
        done = f"evicted until it is caught up; updates missed in a row: {engine.failures}"
        who = f"engine {engine.index}"
        self._ledger.record(facts.Failed(who=who, where="engine", sentence=str(error), done=done))
        self.evict(engine, str(error))

    def _tell(self, engine: Engine, event: Literal["joined", "left", "committed"], detail: str = "") -> None:
        fact = facts.EngineChanged(engine=engine.index, event=event, version=engine.version, detail=detail)
        self._ledger.record(fact)

    # --- health and load ----------------------------------------------------------------------------------------------
    def poll(self) -> None:
        """Ask for fresh statistics soon."""
        self._poll_due = True
        self.change.notify()

    @property
    def idle(self) -> float | None:
        """Share of the time in which the engines computed nothing, on average; None before two reports."""
        shares = [engine.busy for engine in self.serving if engine.busy is not None]
        return 1.0 - sum(shares) / len(shares) if shares else None

    async def watch(self, tell: Tell | None = None, *, every: float | None = None) -> None:
        """Until cancelled: whenever asked to, and every so many seconds.

        `tell` hears what those say that answer and are given groups: others are not what a scheduler can fill.
        """
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(every):
                    await self.change.until(lambda: self._poll_due)
            self._poll_due = False
            async with asyncio.TaskGroup() as group:
                checks = [(engine, group.create_task(self._check(engine))) for engine in self.serving]
            if tell is not None:
                loads = [check.result() for engine, check in checks if engine.kind != "prefill"]
                tell([load for load in loads if load is not None])

    async def _check(self, engine: Engine) -> EngineLoad | None:
        try:
            async with asyncio.timeout(_STATISTICS_TIMEOUT):
                statistics = await engine.client.statistics()
        except (InfrastructureError, TimeoutError) as error:
            self.evict(engine, f"no statistics: {error}")
            return None
        engine.report(statistics["busy_seconds"], self._clock())
        names = (field.name for field in attrs.fields(EngineLoad) if field.name != "engine")
        return EngineLoad(engine=engine.index, **{name: float(statistics.get(name, 0.0)) for name in names})
