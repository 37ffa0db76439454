"""The server-sent events of one streamed chat completion, in OpenAI's shape.

Each event carries what a continuation gained since the one before it; a slow client gets fewer and longer ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from prl.providers import Renderer
from prl.serve.generate import usage
from prl.serve.refusal import RefusedError
from prl.serve.requests import Result
from prl.types import Int32

_HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes the first bytes of an unfinished character to."""


class ChatEvents:
    """Opened, told about growing tokens, closed; in this order."""

    def __init__(self, envelope: Mapping[str, Any], renderer: Renderer, *, n: int) -> None:
        self._envelope = envelope
        self._renderer = renderer
        self._told = [""] * n
        self.response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})

    async def open(self, http: web.Request) -> None:
        await self.response.prepare(http)
        for index in range(len(self._told)):
            await self._send(_choice(index, {"role": "assistant", "content": ""}))

    async def tell(self, tokens: Mapping[int, Int32]) -> None:
        """Send what is new in the tokens of each continuation; half a character waits for its other half."""
        for index, so_far in sorted(tokens.items()):
            await self._tell(index, self._text(so_far).rstrip(_HALF_CHARACTER))

    async def close(self, result: Result, *, include_usage: bool) -> None:
        for index, completion in enumerate(result.completions):
            await self._tell(index, self._text(completion.tokens))
            await self._send(_choice(index, {}, completion.stop.value))
        if include_usage:
            await self._send(usage=usage(result))
        await self.response.write(b"data: [DONE]\n\n")
        await self.response.write_eof()

    async def refuse(self, refusal: RefusedError) -> None:
        """Instead of `close`: what was told so far is not the answer."""
        await self.response.write(b"data: " + json.dumps(refusal.body()).encode() + b"\n\n")
        await self.response.write_eof()

    def _text(self, tokens: Int32) -> str:
        return str(self._renderer.parse(tokens.tolist())["content"])

    async def _tell(self, index: int, text: str) -> None:
        told = self._told[index]
        if text != told and text.startswith(told):
            await self._send(_choice(index, {"content": text[len(told) :]}))
            self._told[index] = text

    async def _send(self, *choices: Mapping[str, Any], **more: Any) -> None:
        event = {**self._envelope, "choices": choices, **more}
        await self.response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


def _choice(index: int, delta: Mapping[str, Any], stop: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": stop}
