"""What an advantage has learnt from the groups it has seen (a running baseline, say), so that a checkpoint can hold it.

Credit is given when a batch is formed, one batch ahead of the trainer. A resumed run forms that batch again, so what a
checkpoint holds is the state before the oldest batch that was formed and not trained. An advantage without
`state_dict` and `load_state_dict` has no state. Used by the loop that forms batches, and by checkpoints.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import attrs

from prl.providers import AdvantageFunction, StatefulAdvantage

log = logging.getLogger(__name__)


@attrs.define(eq=False)
class CreditState:
    """The advantage of a run, with its past."""

    advantage: AdvantageFunction
    _before: dict[int, Mapping[str, Any]] = attrs.field(factory=dict, init=False)
    """Version -> state before the batch that trains it was given credit."""

    def forming(self, version: int, trained: int) -> None:
        """The batch that trains `version` is about to be given credit; the trainer holds version `trained`."""
        self._before = {before: state for before, state in self._before.items() if before >= trained}
        self._before[version] = self._state()

    def state_dict(self, trained: int) -> dict[str, Any]:
        """As a run that continues from version `trained` needs it; JSON-ready."""
        return {"of": self._name, "state": self._before.get(trained, self._state())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What another advantage has learnt is left alone: this one begins anew."""
        if not isinstance(self.advantage, StatefulAdvantage) or not state.get("state"):
            return
        if state["of"] == self._name:
            self.advantage.load_state_dict(state["state"])
        else:
            log.warning("the checkpoint has the credit state of %s; %s begins anew", state["of"], self._name)

    def _state(self) -> Mapping[str, Any]:
        return self.advantage.state_dict() if isinstance(self.advantage, StatefulAdvantage) else {}

    @property
    def _name(self) -> str:
        kind = type(self.advantage)
        return f"{kind.__module__}.{kind.__qualname__}"
