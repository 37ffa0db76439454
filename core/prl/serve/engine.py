"""What the endpoints ask of an engine. Whoever writes one implements this; HTTP is not its concern."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from prl.serve.requests import Request, Result, Stream
from prl.types import Manifest


class Engine(Protocol):
    """Generation and weights of one model. Every method may raise RefusedError, whose sentence is the answer."""

    @property
    def version(self) -> int:
        """Of the policy being served; -1 before the first."""

    @property
    def length(self) -> int:
        """Most tokens of a sequence, prompt included."""

    @property
    def vocab_size(self) -> int: ...

    # --- generation -----------------------------------------------------------------------------------------------
    async def generate(self, request: Request) -> Result:
        """The finished request; cancelling aborts it."""

    def stream(self, request: Request) -> AbstractContextManager[Stream]:
        """The request's state as it grows; leaving before there is a result aborts it."""

    async def abort(self, request_id: str) -> bool:
        """End a request: whoever waits for it gets the tokens so far. False when there is no such request."""

    async def pause(self) -> None:
        """Compute nothing until `resume`; requests are kept and accepted."""

    async def resume(self) -> None: ...

    # --- weights --------------------------------------------------------------------------------------------------
    async def prepare(self, manifest: Manifest) -> None:
        """Fetch and verify a version while the one before it is served."""

    async def commit(self, version: int) -> None:
        """Serve a prepared version from the next token on; requests go on. The served version is no change."""

    # --- watching -------------------------------------------------------------------------------------------------
    async def statistics(self) -> Mapping[str, float]:
        """Totals since the start and the state of now, under the names in `prl.serve.metrics`."""


@runtime_checkable
class ResumableEngine(Protocol):
    """An engine that can say what it has of a request before it is answered."""

    async def so_far(self, request_id: str) -> Result:
        """The tokens of each continuation by now, ABORT where they are not all; without any if there is no request."""
