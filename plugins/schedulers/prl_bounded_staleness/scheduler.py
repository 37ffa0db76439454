"""The rule of bounded staleness: start only what can still be fresh when its turn comes, drop what no longer is.

Groups are trained `groups_per_step` at a time. A group that starts now, at the served version `v`, behind `n` groups
that are ready or running, is trained at `next_version + n // groups_per_step`, provided that those finish first;
starting it is safe while that is at most `v + max_staleness`. Solved for the number of groups, this is `capacity`.
Stragglers can still be overtaken, so `admit` is what guarantees the bound, and `on_publish` saves the work on groups
that have already lost.

Where the engines outrun the trainer, room appears a step's groups at a time, and so many decode together. Decoding more
rows at once costs less per token, so groups can be made to wait for each other (`together`), at the price of age.

With 0 a step's groups start only when the engines serve the version that is to be trained: the synchronous loop. The
rule is AReaL's staleness control (Fu et al. 2025, arXiv 2505.24298) at group granularity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
from prl.providers import Drop, InFlight, Pipeline
from prl.types import Group

from prl_bounded_staleness import BoundedStalenessConfig


@attrs.define(kw_only=True)
class BoundedStaleness:
    """A function of what it is shown; it never looks at a clock.

    Example:
        >>> scheduler = BoundedStaleness(max_staleness=1, groups_per_step=8)
        >>> scheduler.capacity(Pipeline(version=4, next_version=5, ready=2, running=3))
        3
    """

    max_staleness: int
    groups_per_step: int
    together: int = 1
    """Room for so many groups must be there before the first of them starts; at most max_staleness steps' worth."""
    _starting: bool = attrs.field(default=False, init=False, eq=False)
    """Room was found, and is being filled."""

    def capacity(self, pipeline: Pipeline) -> int:
        """Positive whenever nothing runs, a step lacks groups and `next_version` is within the bound of `version`."""
        steps = self.max_staleness + 1 - (pipeline.next_version - pipeline.version)
        room = steps * self.groups_per_step - pipeline.ready - pipeline.running
        self._starting = room > 0 if self._starting else room >= self.together
        return room if self._starting else 0

    def select(self, ready: Sequence[int], outstanding: Sequence[int], count: int) -> Sequence[int]:
        """The oldest that are finished; stragglers are not waited for."""
        return ready[:count]

    def admit(self, group: Group, version: int) -> Drop | None:
        if version - group.oldest_version > self.max_staleness:
            return Drop(group_id=group.group_id, reason="stale")
        return None

    def on_publish(self, version: int, in_flight: Sequence[InFlight]) -> list[Drop]:
        """Every group still in flight is trained at `version` at the earliest."""
        return [
            Drop(group_id=group.group_id, reason="stale")
            for group in in_flight
            if version - group.started_version > self.max_staleness
        ]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore: the bound is the config's, the rest is in the pipeline, and room is found again."""


def build(config: BoundedStalenessConfig, groups_per_step: int, clock: Callable[[], float]) -> BoundedStaleness:
    """The scheduler; time plays no part in it."""
    return BoundedStaleness(
        max_staleness=config.max_staleness, groups_per_step=groups_per_step, together=config.together
    )
