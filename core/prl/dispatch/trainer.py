"""The trainer as the controller sees it: every order goes to all ranks, an answer is what all ranks answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from prl.checkpoint_dir import FileRecord
from prl.dispatch.hub import DisconnectedError, Hub
from prl.errors import InfrastructureError, RunError
from prl.messages import Publish, Retire, Save, StepDone, TrainStep
from prl.types import Batch, Manifest

_FIRST_STEP_SECONDS = 3600.0
_TIMES_LONGER = 10
_LAUNCHER_SECONDS = 60.0  # a rank's death reaches the launcher through its agent, which first ends the other ranks


class Trainer:
    """All ranks. Steps and publications are awaited one after the other; a save is awaited while they go on.

    Where a rank is gone, its launcher knows of what it died and ends the run with that: the controller waits for it,
    `patience` seconds, before it gives its own word, which is only that the rank is gone. Ranks that live and do not
    come to the end of a step, as when they wait for each other, are given up after a time derived from the steps
    before: `_TIMES_LONGER` what the slowest token took so far, and `patience`.
    """

    def __init__(self, hub: Hub, peers: Sequence[bytes], *, patience: float = _LAUNCHER_SECONDS) -> None:
        self._hub = hub
        self._patience = patience
        self._seconds_per_token = 0.0
        """Of the slowest step."""
        self._peers = tuple(peers)
        """By rank."""

    async def step(self, batch: Batch, *, learning_rate: float, publish: bool, trace: str = "") -> list[StepDone]:
        """Train one step, each rank on its own micro-batches; what every rank reports. `trace`: see `TrainStep`.

        InfrastructureError when it takes far longer than the steps before.
        """
        for peer, micro_batches in zip(self._peers, batch.ranks, strict=True):
            share = attrs.evolve(batch, ranks=(micro_batches,))
            order = TrainStep(batch=share, learning_rate=learning_rate, publish=publish, trace=trace)
            await self._send(peer, order)
        started, tokens = time.monotonic(), max(1, sum(len(micro.tokens) for rank in batch.ranks for micro in rank))
        allowed = self._allowed(tokens)
        try:
            async with asyncio.timeout(allowed):
                reports = await self._reports()
        except TimeoutError:
            sentence = f"step {batch.step} of {tokens} tokens was not trained within {allowed:.0f} s"
            raise InfrastructureError(f"{sentence}; `prl logs trainer` shows what the ranks do") from None
        self._seconds_per_token = max(self._seconds_per_token, (time.monotonic() - started) / tokens)
        return reports

    def _allowed(self, tokens: int) -> float:
        """Seconds for a step; the first may have to compile."""
        if not self._seconds_per_token:
            return _FIRST_STEP_SECONDS
        return self._patience + _TIMES_LONGER * self._seconds_per_token * tokens

    async def publish(self) -> Manifest:
        """Have the weights the trainer holds sent through the transport."""
        await self._send_all(Publish())
        manifest = manifest_of(await self._reports())
        if manifest is None:
            raise RunError("no trainer rank published the weights it was asked to publish")
        return manifest

    async def retire(self, version: int) -> None:
        await self._send_all(Retire(version=version))

    async def save(self, step: int, path: Path) -> None:
        """Have every rank write its part of a checkpoint into `path`, as it is after the orders given before."""
        await self._send_all(Save(step=step, path=str(path)))

    async def saved(self, step: int) -> Mapping[str, FileRecord]:
        """Wait until every rank's part of that checkpoint is on disk; the files of all of them."""
        parts = await asyncio.gather(*(self._hub.saved(rank) for rank in range(len(self._peers))))
        if any(part.step != step for part in parts):
            raise RunError(f"trainer ranks saved steps {[part.step for part in parts]} where step {step} was asked for")
        return {name: record for part in parts for name, record in part.files.items()}

    async def _send_all(self, message: Any) -> None:
        for peer in self._peers:
            await self._send(peer, message)

    async def _send(self, peer: bytes, message: Any) -> None:
        try:
            await self._hub.send(peer, message)
        except DisconnectedError:
            await asyncio.sleep(self._patience)
            raise

    async def _reports(self) -> list[StepDone]:
        return await asyncio.gather(*(self._hub.reply(peer) for peer in self._peers))


def manifest_of(reports: Sequence[StepDone]) -> Manifest | None:
    """The version that the ranks have sent, each its part; None if they were not asked to."""
    sent = [report.manifest for report in reports if report.manifest is not None]
    parts = tuple(part for manifest in sent for part in manifest.parts if part.tensors)
    return Manifest(version=sent[0].version, parts=parts) if sent else None
