"""The engine as the endpoints see it: checks what is asked, hands it to the model's thread, swaps weights in.

Knows tokens and versions, nothing of HTTP but the statuses of its refusals. Built by `server.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AbstractContextManager

from prl.errors import InfrastructureError
from prl.serve.refusal import RefusedError
from prl.serve.requests import Request, Result, Stream
from prl.types import Manifest

from prl_torch_engine.generation import Generation
from prl_torch_engine.scheduler import Scheduler
from prl_torch_engine.weights import Weights


class Engine:
    """Generation and weights of one model."""

    def __init__(self, scheduler: Scheduler, generation: Generation, weights: Weights, *, vocab_size: int) -> None:
        self._scheduler = scheduler
        self._generation = generation
        self._weights = weights
        self._updates = 0
        self.vocab_size = vocab_size

    @property
    def version(self) -> int:
        """Of the policy being served; -1 before the first."""
        return self._scheduler.version

    @property
    def length(self) -> int:
        """Most tokens of a sequence, prompt included."""
        return self._scheduler.rows.length

    # --- generation -----------------------------------------------------------------------------------------------
    async def generate(self, request: Request) -> Result:
        return await self._generation.generate(request)

    def stream(self, request: Request) -> AbstractContextManager[Stream]:
        return self._generation.stream(request)

    async def so_far(self, request_id: str) -> Result:
        return await self._generation.so_far(request_id)

    async def abort(self, request_id: str) -> bool:
        return await self._generation.abort(request_id)

    async def pause(self) -> None:
        await self._generation.pause()

    async def resume(self) -> None:
        await self._generation.resume()

    # --- weights --------------------------------------------------------------------------------------------------
    async def prepare(self, manifest: Manifest) -> None:
        """Fetch and verify a version while the one before it is served."""
        if manifest.version < self._scheduler.version:
            served = self._scheduler.version
            raise RefusedError(409, f"version {manifest.version} is older than version {served}, which is served")
        try:
            await asyncio.to_thread(self._weights.prepare, manifest)
        except InfrastructureError as error:
            raise RefusedError(422, f"version {manifest.version} cannot be prepared: {error}") from error

    async def commit(self, version: int) -> None:
        """Serve a prepared version from the next step on; requests go on. The served version is no change."""
        try:
            await self._generation.between_steps(lambda: self._swap(version))
        except InfrastructureError as error:
            raise RefusedError(409, str(error)) from None

    def _swap(self, version: int) -> None:
        served, staged = self._scheduler.version, self._weights.staged_version
        if staged == version:
            self._weights.swap()
            self._scheduler.set_version(version)
            self._updates += 1
        elif served != version:
            known = "no version is prepared" if staged is None else f"version {staged} is prepared"
            raise InfrastructureError(f"version {version} was not prepared ({known}, version {served} is served)")

    # --- what a person or the controller asks ---------------------------------------------------------------------
    async def statistics(self) -> Mapping[str, float]:
        """Totals since the start; `running` and `waiting` count sequences."""
        scheduler = self._scheduler
        return {
            "version": scheduler.version,
            "running": len(scheduler.batch),
            "waiting": scheduler.waiting,
            "sequences": scheduler.batch.capacity,
            "length": self.length,
            "kv_tokens": scheduler.batch.capacity * self.length,
            "kv_usage": scheduler.rows.taken(len(scheduler.batch)),
            "preemptions": 0,  # a row is a sequence's to its end
            "paused": int(self._generation.paused),
            "generated_tokens": scheduler.generated_tokens,
            "prompt_tokens": scheduler.prompt_tokens,
            "prefix_hit_tokens": scheduler.reused_tokens,
            "busy_seconds": self._generation.busy_seconds,
            "updates": self._updates,
        }
