"""The rows beyond the decoding ones: prompts being computed, and prefixes kept for requests to come.

A prompt is computed once in such a row and copied to every continuation; the row then keeps it until another prompt
needs the room (least recently used first). A finished turn of a session is kept likewise. Called by `scheduler.py`.
"""

from __future__ import annotations

import attrs
from torch import Tensor

from prl_torch_engine.rows import Rows


@attrs.define
class _Slot:
    session: str = ""
    used: int = 0
    """When it was last of use, on the clock of `PromptRows`."""
    pinned: bool = False
    """A prompt is being computed in it."""


class PromptRows:
    """Gives out and takes back the prompt rows."""

    def __init__(self, rows: Rows, *, first: int, reuse: bool) -> None:
        self._rows = rows
        self._reuse = reuse
        self._slots = {row: _Slot() for row in range(first, rows.count)}
        self._clock = 0

    def claim(self, prompt: Tensor, session: str) -> tuple[int, int] | None:
        """A row that holds as much of `prompt` as any row did, pinned, and how many tokens that is.

        None when every row is pinned.
        """
        donor, common = self._rows.longest_prefix(prompt) if self._reuse else (0, 0)
        row = donor if self._may_take(donor, session, common) else self._oldest()
        if row is None:
            return None
        if common and row != donor:
            self._rows.copy(donor, row, common)
        self._rows.tokens[row, : len(prompt)] = prompt
        self._rows.past[row] = common
        self._rows.stamps[row] = self._rows.generation
        self._mark(row, session, pinned=True)
        return row, common

    def release(self, row: int) -> None:
        """The prompt in `row` is computed, or given up: what was computed stays until the room is needed."""
        self._mark(row, self._slots[row].session, pinned=False)

    def keep(self, source: int, session: str, length: int) -> None:
        """Keep `length` tokens of a decoding row whose turn ended; the session's older prefix gives way."""
        if not self._reuse:
            return
        own = [r for r, slot in self._slots.items() if slot.session == session and not slot.pinned]
        row = own[0] if len(own) == 1 and self._extends(source, own[0], length) else self._oldest()
        if row is not None:
            self._rows.copy(source, row, length)
            self._mark(row, session, pinned=False)

    def _extends(self, source: int, row: int, length: int) -> bool:
        """What lies in `row` is the beginning of what lies in `source`."""
        past = min(int(self._rows.past[row]), length)
        tokens = self._rows.tokens
        return bool((tokens[source, :past] == tokens[row, :past]).all())

    def _may_take(self, donor: int, session: str, common: int) -> bool:
        """Whether the donor itself can become the prompt's row: nothing that others could use is lost."""
        slot = self._slots.get(donor)
        if slot is None or slot.pinned or common == 0:
            return False
        return (session != "" and slot.session == session) or int(self._rows.past[donor]) <= common + 1

    def _oldest(self) -> int | None:
        """The unpinned row that matters least: stale ones first, then the least recently used."""
        free = [(self._rows.current(r), slot.used, r) for r, slot in self._slots.items() if not slot.pinned]
        return min(free)[2] if free else None

    def _mark(self, row: int, session: str, *, pinned: bool) -> None:
        self._clock += 1
        self._slots[row] = _Slot(session, self._clock, pinned)
