"""What is asked of an engine and what it answers: plain data, shared by the endpoints and the engines behind them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs

from prl.serve.refusal import RefusedError
from prl.types import Completion, Int32, Sampling, as_tokens

if TYPE_CHECKING:
    from prl.serve.engine import Engine

MAX_SIBLINGS = 1024
MAX_STOPS = 16
"""Most stop tokens of one request."""
MIN_TEMPERATURE = 1e-3
"""Logits divided by less would overflow; 0 is greedy."""


@attrs.frozen(kw_only=True, eq=False)
class Request:
    """A checked request: `n` continuations of one prompt, each of which fits into a sequence of the engine."""

    request_id: str
    prompt: Int32  # [P]
    sampling: Sampling
    n: int
    stop: tuple[int, ...]
    session: str = ""
    """Turns of one conversation share it; a finished turn is then kept for the next one."""
    routes_from: int | None = None
    """The first token whose routes are wanted; None: none are."""
    streaming: bool = False
    """Report the tokens of every step, not only the finished completions."""


def checked(
    engine: Engine,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    n: int,
    stop: tuple[int, ...],
    session: str = "",
    request_id: str = "",
    routes_from: int | None = None,
    streaming: bool = False,
) -> Request:
    """A request that the engine can serve; RefusedError says why not."""
    length = engine.length
    if engine.version < 0:
        raise RefusedError(503, "no weights were committed yet; try again when the first version is published")
    if not 0 < len(prompt) < length:
        raise RefusedError(
            400, f"the prompt has {len(prompt)} tokens; a sequence has room for 1 to {length - 1} of them"
        )
    if 0 < sampling.temperature < MIN_TEMPERATURE:
        raise RefusedError(400, f"temperature {sampling.temperature} must be 0 or at least {MIN_TEMPERATURE}")
    if sampling.min_tokens > sampling.max_tokens:
        raise RefusedError(400, f"min_tokens {sampling.min_tokens} is more than max_tokens {sampling.max_tokens}")
    if len(stop) > MAX_STOPS:
        raise RefusedError(400, f"{len(stop)} stop tokens; at most {MAX_STOPS} are possible")
    return Request(
        request_id=request_id or f"gen-{secrets.token_hex(8)}",
        prompt=as_tokens(prompt),
        sampling=sampling,
        n=n,
        stop=stop,
        session=session,
        routes_from=routes_from,
        streaming=streaming,
    )


@attrs.frozen(kw_only=True)
class Result:
    """The answer to a request."""

    request_id: str
    completions: tuple[Completion, ...]
    prompt_tokens: int
    reused_tokens: int
    """Prompt tokens that were found in the cache."""


@attrs.frozen(kw_only=True)
class Progress:
    """What one continuation of a streaming request has so far."""

    request_id: str
    member: int
    tokens: Int32  # [n so far]


@attrs.define(eq=False)
class Stream:
    """What a streaming request has so far: the newest state only, so a slow reader holds nothing up."""

    tokens: dict[int, Int32] = attrs.field(factory=dict)
    result: Result | None = None
    _changed: asyncio.Event = attrs.field(factory=asyncio.Event)

    def update(self, news: Progress | Result) -> None:
        if isinstance(news, Result):
            self.result = news
        else:
            self.tokens[news.member] = news.tokens
        self._changed.set()

    async def change(self) -> None:
        """Wait until there is something that the last call had not seen."""
        await self._changed.wait()
        self._changed.clear()
