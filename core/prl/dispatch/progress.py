"""Where a run stands: the three version counters that the loops of the controller share."""

from __future__ import annotations

import attrs

from prl.dispatch.change import Change


@attrs.define(kw_only=True, eq=False)
class Progress:
    """Versions count optimizer steps, warm-up included, so `trained` is also the number of steps done.

    Always `served <= trained <= formed`: the engines serve `served`, the trainer holds `trained`, and the next batch
    to be formed will be trained at `formed`.
    """

    steps: int
    """Steps of the whole run, warm-up included."""
    trained: int = 0
    formed: int = 0
    served: int = 0
    change: Change = attrs.field(factory=Change)
    """Notified when a counter moves, a group ends, or an engine comes or goes: whatever a loop may be waiting for."""

    async def until_served(self, version: int) -> None:
        """Wait until the engines serve `version` or a newer one."""
        await self.change.until(lambda: self.served >= version)
