"""An engine as somebody else would write one: it says the prompt again, and counts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from prl.serve.application import application, listening
from prl.serve.refusal import RefusedError
from prl.serve.requests import Progress, Request, Result, Stream
from prl.serve.speech import Speech
from prl.types import Completion, Manifest, StopReason

if TYPE_CHECKING:
    from prl.weights.engines import EngineContext


class Parrot:
    length = 64
    vocab_size = 40

    def __init__(self) -> None:
        self.version = -1
        self._prepared = -1
        self._said = 0

    async def generate(self, request: Request) -> Result:
        said = request.prompt[: request.sampling.max_tokens]
        self._said += request.n * len(said)
        completion = Completion(
            tokens=said,
            logprobs=np.zeros(len(said), np.float32),
            versions=np.full(len(said), self.version, np.int32),
            stop=StopReason.LENGTH,
        )
        return Result(
            request_id=request.request_id,
            completions=(completion,) * request.n,
            prompt_tokens=len(request.prompt),
            reused_tokens=0,
        )

    @contextmanager
    def stream(self, request: Request) -> Iterator[Stream]:
        stream = Stream()
        said = request.prompt[: request.sampling.max_tokens]
        for member in range(request.n):
            stream.update(Progress(request_id=request.request_id, member=member, tokens=said[:1]))
        finish = asyncio.ensure_future(self.generate(request))
        finish.add_done_callback(lambda done: None if done.cancelled() else stream.update(done.result()))
        try:
            yield stream
        finally:
            finish.cancel()

    async def abort(self, request_id: str) -> bool:
        return False  # nothing takes long enough

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...

    async def prepare(self, manifest: Manifest) -> None:
        self._prepared = manifest.version

    async def commit(self, version: int) -> None:
        if version not in (self._prepared, self.version):
            raise RefusedError(409, f"version {version} was not prepared")
        self.version = version

    async def statistics(self) -> Mapping[str, float]:
        return {"version": self.version, "running": 0, "waiting": 0, "generated_tokens": self._said, "busy_seconds": 0}


async def serve(context: EngineContext) -> None:
    """What `Engine(serve="...")` names: announce the engine once it listens, and serve until cancelled."""
    speech = Speech.of(context.composition)
    async with listening(application(Parrot(), speech, context.token), context.host) as url:
        await context.announce(url)
        await asyncio.Event().wait()
