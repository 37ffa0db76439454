"""An advantage with a memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from prl.types import Group


@attrs.define(eq=False)
class RunningBaseline:
    """Rewards less the mean of all rewards seen before."""

    total: float = 0.0
    seen: int = 0

    def __call__(self, group: Group) -> Sequence[float]:
        baseline = self.total / self.seen if self.seen else 0.0
        self.total += sum(group.rewards)
        self.seen += len(group.rewards)
        return [reward - baseline for reward in group.rewards]

    def state_dict(self) -> Mapping[str, Any]:
        return {"total": self.total, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total, self.seen = state["total"], state["seen"]
