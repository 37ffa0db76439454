"""The rule of the window: a finished group may overtake an unfinished one, but only so far; then the batch waits.

Greedy batches (whatever is finished first) train on short rollouts first and cut long ones when they turn stale: the
policy sees fewer hard tasks than it was given. Strict order waits for every straggler. Between them lies the window of
`window` groups that begins at the oldest unfinished group: finished groups inside it are trained, those beyond it wait
until it moves, which it does only when that oldest group is finished (or given up).

Nothing is lost to the bound either. A group that starts at the served version `v` with `n` groups ready or running is
trained after at most those `n` and `window - 1` that overtake it, hence at `next_version + (n + window - 1) //
groups_per_step` at the latest, since the batch waits for it then. `capacity` starts a group only when that is at most
`v + max_staleness`: overtaking is paid for with less running ahead, not with stale groups. A group that is tried again
keeps its place and the room that it left. Only an engine that serves an older version than the newest can still bring a
stale token; `admit` refuses it.

The window is that of "The MiniMax-M2 Series" (arXiv 2605.26494, section 6.2.4), anchored as in torchtitan's RL. There
`window_fraction` is a share of all groups under way, and the bound grows with it, to `(B + W - 2) // P` steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import floor
from typing import Any

import attrs
from prl.providers import Drop, InFlight, Pipeline
from prl.types import Group

from prl_windowed_fifo import WindowedFifoConfig


@attrs.frozen(kw_only=True)
class WindowedFifo:
    """A pure function of what it is shown: it keeps no state between calls and never looks at a clock.

    Example:
        >>> scheduler = WindowedFifo(max_staleness=1, groups_per_step=2, window=3)
        >>> scheduler.select([5, 6, 7], [4], 2), scheduler.select([5, 7, 8], [4], 2)
        ([5, 6], [])
    """

    max_staleness: int
    groups_per_step: int
    window: int
    """Groups, from 1 (strict order) to max_staleness * groups_per_step + 1 (a step's groups may just start)."""

    def capacity(self, pipeline: Pipeline) -> int:
        """Positive whenever nothing runs, a step lacks groups and the engines serve `next_version`."""
        steps = self.max_staleness + 1 - (pipeline.next_version - pipeline.version)
        return max(0, steps * self.groups_per_step - (self.window - 1) - pipeline.ready - pipeline.running)

    def select(self, ready: Sequence[int], outstanding: Sequence[int], count: int) -> list[int]:
        """The oldest `count` of the ready groups inside the window that begins at the oldest outstanding one."""
        if outstanding:
            end = min(outstanding) + self.window
            ready = [group_id for group_id in ready if group_id < end]
        return list(ready[:count]) if len(ready) >= count else []

    def admit(self, group: Group, version: int) -> Drop | None:
        if version - group.oldest_version > self.max_staleness:
            return Drop(group_id=group.group_id, reason="stale")
        return None

    def on_publish(self, version: int, in_flight: Sequence[InFlight]) -> list[Drop]:
        """Nothing: no batch was formed that a group in flight needed to be in."""
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore: window and bound are the config's, the rest is in the pipeline."""


def build(config: WindowedFifoConfig, groups_per_step: int, clock: Callable[[], float]) -> WindowedFifo:
    """The scheduler; time plays no part in it."""
    slack = config.max_staleness * groups_per_step
    return WindowedFifo(
        max_staleness=config.max_staleness,
        groups_per_step=groups_per_step,
        window=1 + floor(config.window_fraction * slack),
    )
