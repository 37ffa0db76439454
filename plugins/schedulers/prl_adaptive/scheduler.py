"""Another scheduler's rule with a limit to the groups in flight, which the engines' load decides (`limit.py`).

What is fresh enough, what a batch is made of and what has become stale are the inner scheduler's; this one starts
fewer groups, and cuts the youngest where caches overflow: the least work is lost, and the oldest are trained soonest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
from prl.providers import Drop, EngineLoad, InFlight, LoadAwareScheduler, Pipeline, RolloutScheduler
from prl.types import Group

from prl_adaptive import AdaptiveConfig
from prl_adaptive.limit import Limit


@attrs.frozen(kw_only=True)
class Adaptive:
    """Decides by what it was told alone, so that a replay decides the same."""

    within: RolloutScheduler
    limit: Limit
    poll_seconds: float

    def capacity(self, pipeline: Pipeline) -> int:
        return max(0, min(self.within.capacity(pipeline), self.limit.value - pipeline.running))

    def admit(self, group: Group, version: int) -> Drop | None:
        return self.within.admit(group, version)

    def select(self, ready: Sequence[int], outstanding: Sequence[int], count: int) -> Sequence[int]:
        return self.within.select(ready, outstanding, count)

    def on_publish(self, version: int, in_flight: Sequence[InFlight]) -> Sequence[Drop]:
        return self.within.on_publish(version, in_flight)

    def observe(
        self, at: float, loads: Sequence[EngineLoad], pipeline: Pipeline, in_flight: Sequence[InFlight]
    ) -> list[Drop]:
        keep = self.limit.observe(
            at, loads, running=len(in_flight), arrived=pipeline.arrived, group_size=pipeline.group_size
        )
        surplus = [] if keep is None else _oldest_first(in_flight)[keep:]
        drops = [Drop(group_id=group.group_id, reason="overload") for group in surplus]
        if isinstance(self.within, LoadAwareScheduler):
            cut = {drop.group_id for drop in drops}
            left = [group for group in in_flight if group.group_id not in cut]
            drops += self.within.observe(at, loads, pipeline, left)
        return drops

    def gauges(self) -> dict[str, float]:
        inner = self.within.gauges() if isinstance(self.within, LoadAwareScheduler) else {}
        return {**inner, "scheduler/limit": float(self.limit.value)}

    def state_dict(self) -> dict[str, Any]:
        return {"within": self.within.state_dict(), "limit": self.limit.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """A checkpoint of a run with another scheduler has no limit: it is learned."""
        self.within.load_state_dict(state.get("within", state))
        if "limit" in state:
            self.limit.load_state_dict(state["limit"])


def _oldest_first(in_flight: Sequence[InFlight]) -> list[InFlight]:
    """Ties by order of issue."""
    return sorted(in_flight, key=lambda group: (group.started_at, group.group_id))


def build(
    config: AdaptiveConfig, groups_per_step: int, clock: Callable[[], float], *, within: RolloutScheduler
) -> Adaptive:
    """The scheduler around `within`; loads bring their own time."""
    limit = Limit(start=config.start, most=config.most)
    return Adaptive(within=within, limit=limit, poll_seconds=config.poll_seconds)
