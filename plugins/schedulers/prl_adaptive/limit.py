"""How many groups the engines bear: additive knowledge, multiplicative cuts (AIMD), from nothing but what they report.

    calm      nobody waits, KV below 0.6, and the limit is what holds back:  x 1.25 for every turnover of the pool
    full      KV above 0.8:  what runs, shrunk to 0.7; nothing is cut, nothing starts until enough has ended
              KV above 0.9:  the same, and the youngest are cut down to it
    thrash    a sequence was preempted:                                      x 0.8, the second time in a row x 0.5
    queue     more wait than half of those that run, for 6 polls:            x 0.9, the second time in a row x 0.5
    changed   engines left or joined:                                        in proportion

There is no model of what a group costs: every estimate of it is biased while groups of all ages are in flight. Growth
is clocked by turnover of the pool, since a group may take seconds or an hour. After a cut nothing is cut again before
the pool has shrunk to it and the engines are quiet, or have had 6 polls' time to be. Growth stops while no news comes.
The thresholds and factors are those that prime-rl measured on agentic tasks (its pull request 3285, August 2026).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor
from typing import Any

import attrs
from prl.providers import EngineLoad

GROW, CALM_KV, BINDING = 1.25, 0.6, 0.9
FULL_KV, TRIM_KV, TARGET_KV = 0.8, 0.9, 0.7
PREEMPTED, QUEUED, AGAIN = 0.8, 0.9, 0.5
QUEUE_SHARE, PATIENCE = 0.5, 6
"""Waiting / running sequences that are too many, and for how many polls in a row."""
FORGIVEN = 12
"""Polls without a cut after which the next one is a first again."""
STALE_SECONDS = 15.0
"""Without news for so long, a calm engine may be one that has stopped answering."""


@attrs.define(kw_only=True)
class Limit:
    """A pure state machine; `value` is the most groups in flight, 0 before the engines were heard.

    Example:
        >>> limit = Limit(start=4, most=64)
        >>> limit.observe(0.0, loads, running=0, arrived=0, group_size=8), limit.value
        (None, 4)
    """

    start: int
    most: int
    _value: float = 0.0
    _heard: float | None = None
    _engines: int = 0
    _arrived: int = 0
    _preemptions: dict[int, float] = attrs.field(factory=dict)
    """Engine -> its total, when it was last heard."""
    _queued: int = 0
    """Polls in a row with too many waiting."""
    _draining: bool = False
    """A cut has not come into effect yet."""
    _drained: int = 0
    """Polls since the pool has shrunk to the last cut."""
    _since_cut: int = FORGIVEN
    """Polls since the last cut."""

    @property
    def value(self) -> int:
        return floor(self._value)

    def observe(
        self, at: float, loads: Sequence[EngineLoad], *, running: int, arrived: int, group_size: int
    ) -> int | None:
        """Take in a poll of the engines that answered, while `running` groups are in flight.

        `arrived` counts groups since the start. To how many groups the pool must be cut at once; None: no cut.
        """
        if not loads:
            return None
        if not self._value:
            self._value = self._clamp(self.start or _room(loads) / group_size)
        elif self._engines != len(loads):
            self._value = self._clamp(self._value * len(loads) / self._engines)
        preempted = self._preempted(loads)
        queue = sum(load.waiting for load in loads) > QUEUE_SHARE * sum(load.running for load in loads)
        self._queued = self._queued + 1 if queue else 0
        self._since_cut += 1
        self._settle(running, quiet=not (preempted or queue))
        turnover = min((arrived - self._arrived) / max(running, 1), 1.0)
        fresh = self._heard is not None and at - self._heard <= STALE_SECONDS
        self._heard, self._engines, self._arrived = at, len(loads), arrived

        kv = max(load.kv_usage for load in loads)
        if kv > FULL_KV:
            return self._shrink(running, kv)
        if preempted:
            self._cut(running, PREEMPTED)
        elif self._queued >= PATIENCE:
            self._cut(running, QUEUED)
        elif fresh and kv < CALM_KV and not any(load.waiting for load in loads) and self._binds(running):
            self._value = self._clamp(self._value * GROW**turnover)
        return None

    # --- cuts ---------------------------------------------------------------------------------------------------------
    def _shrink(self, running: int, kv: float) -> int | None:
        """In proportion to how full the caches are, so that it needs no patience: contexts that run grow on."""
        target = max(floor(running * TARGET_KV / kv), 1)
        self._value = min(self._value, self._clamp(target))
        return target if kv > TRIM_KV and target < running else None

    def _cut(self, running: int, factor: float) -> None:
        """Of what is in flight, where that is less than the limit: a cut never raises it, and always bites."""
        if self._draining:
            return
        factor = factor if self._since_cut > FORGIVEN else AGAIN
        self._value = self._clamp(min(self._value, running) * factor)
        self._draining, self._drained, self._queued, self._since_cut = True, 0, 0, 0

    def _settle(self, running: int, *, quiet: bool) -> None:
        if self._draining and running <= self.value:
            self._drained += 1
            self._draining = not quiet and self._drained < PATIENCE

    # ------------------------------------------------------------------------------------------------------------------
    def _binds(self, running: int) -> bool:
        """It is the limit that holds groups back; one may have ended just now."""
        return not self._draining and (running >= BINDING * self.value or running + 1 >= self.value)

    def _preempted(self, loads: Sequence[EngineLoad]) -> bool:
        """Some engine's total has grown. A lower one is that of a new process, whose first is taken as it is."""
        grown = any(load.preemptions > self._preemptions.get(load.engine, load.preemptions) for load in loads)
        self._preemptions |= {load.engine: load.preemptions for load in loads}
        return grown

    def _clamp(self, value: float) -> float:
        return min(max(value, 1.0), float(self.most))

    # --- checkpoints --------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """What was learned; what the engines said last is said again."""
        return {"value": self._value, "engines": self._engines}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._value, self._engines = float(state["value"]), int(state["engines"])


def _room(loads: Sequence[EngineLoad]) -> float:
    """Sequences that have room on the engines at full length."""
    return sum(min(load.sequences, load.kv_tokens / load.length) for load in loads)
