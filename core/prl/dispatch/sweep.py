"""Removes large columns once nobody will read them: after each step, those of every attempt that is over.

A file belongs to one attempt at one group, and the feed knows which attempts are not over. So nothing has to be told
when a group is trained, dropped, cut, answered too late, or lost with its worker: whatever the reason, its file goes
with the next step. Waits for a step to be trained, and for the disk.
"""

from __future__ import annotations

import asyncio

import attrs

from prl.columns import ColumnFolder, abandoned
from prl.dispatch.feed import Feed
from prl.dispatch.progress import Progress


@attrs.frozen(kw_only=True, eq=False)
class ColumnSweep:
    """A loop of the controller."""

    folder: ColumnFolder
    feed: Feed
    progress: Progress

    async def run(self) -> None:
        """Until cancelled; the first sweep is for what an earlier process of the run left."""
        while True:
            step = self.progress.trained
            files = await asyncio.to_thread(self.folder.files)
            await asyncio.to_thread(self.folder.remove, abandoned(files, self.feed.alive))
            await self._trained_after(step)

    async def _trained_after(self, step: int) -> None:
        await self.progress.change.until(lambda: self.progress.trained > step)
