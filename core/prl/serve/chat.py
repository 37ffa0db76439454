"""`POST /v1/chat/completions`: OpenAI's chat API over the run's renderer, for people and their programs.

Messages become tokens and tokens become messages here; training never comes this way. Fields that would change the
distribution (`top_p`, penalties) are refused unless they are neutral. The model is called by its name, or NAME@VERSION
by those who want tokens of that version and of no other.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import attrs
from aiohttp import web

from prl.errors import UserError
from prl.serve import body
from prl.serve.body import Body
from prl.serve.engine import Engine
from prl.serve.events import ChatEvents
from prl.serve.generate import sampling_of, usage
from prl.serve.refusal import RefusedError
from prl.serve.requests import MAX_SIBLINGS, Request, Result, checked
from prl.serve.speech import Speech
from prl.types import Completion, Message

_NEUTRAL = {"top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "top_logprobs": 0}
_IGNORED = ("user", "metadata", "store", "service_tier", "parallel_tool_calls")
"""Say nothing about what is sampled."""


@attrs.frozen(kw_only=True)
class _Chat:
    """One parsed chat request."""

    request: Request
    logprobs: bool
    token_ids: bool
    include_usage: bool
    model: str
    """As it was asked for."""
    pinned: int | None
    """The version that may answer; None: any."""


class ChatEndpoint:
    def __init__(self, engine: Engine, speech: Speech) -> None:
        self._engine = engine
        self._tokenizer = speech.tokenizer
        self._renderer = speech.renderer
        self._model = speech.model
        self._started = int(time.time())

    async def models(self, http: web.Request) -> web.Response:
        entry = {"id": self._model, "object": "model", "created": self._started, "owned_by": "prl"}
        now = {"max_model_len": self._engine.length, "version": self._engine.version}
        return web.json_response({"object": "list", "data": [entry | now]})

    async def chat(self, http: web.Request) -> web.StreamResponse:
        chat = self._parse(await body.read(http))
        if chat.request.streaming:
            return await self._stream(http, chat)
        result = await self._engine.generate(chat.request)
        self._check_version(chat, result)
        answer = self._envelope(result.request_id, "chat.completion", chat.model)
        answer["choices"] = [self._choice(i, c, chat) for i, c in enumerate(result.completions)]
        answer["usage"] = usage(result)
        if chat.token_ids:
            answer["prompt_token_ids"] = chat.request.prompt.tolist()
        return web.json_response(answer)

    # --- the request ----------------------------------------------------------------------------------------------
    def _parse(self, fields: Body) -> _Chat:
        model = fields.text("model", self._model)
        pinned = self._pinned(model)
        for name, neutral in _NEUTRAL.items():
            if fields.value(name) not in (None, neutral):
                raise fields.refuse(name, f"must be {neutral} or absent: the policy is sampled as it is")
        for name in _IGNORED:
            fields.value(name)
        streaming, logprobs, token_ids = (fields.flag(name) for name in ("stream", "logprobs", "return_token_ids"))
        if streaming and (logprobs or token_ids):
            raise fields.refuse("stream", "cannot be combined with logprobs or return_token_ids")
        options = fields.section("stream_options")
        include_usage = options.flag("include_usage")
        options.finish()
        request = self._request(fields, streaming=streaming)
        fields.finish()
        return _Chat(
            request=request,
            logprobs=logprobs,
            token_ids=token_ids,
            include_usage=include_usage,
            model=model,
            pinned=pinned,
        )

    def _pinned(self, model: str) -> int | None:
        """The version that NAME@VERSION asks for, which is served now; None where only the name is given."""
        name, at, version = model.partition("@")
        if name != self._model or (at and not version.isdecimal()):
            raise RefusedError(404, f"the model {model!r} does not exist; this engine serves {self._model!r}")
        if at and int(version) != self._engine.version:
            raise RefusedError(
                404,
                f"version {int(version)} is not served here; this engine serves {self._model}@{self._engine.version}. "
                "`prl serve RUN@STEP` serves a version of which there is a checkpoint",
            )
        return int(version) if at else None

    def _check_version(self, chat: _Chat, result: Result) -> None:
        """Whoever asks for a version by name gets tokens of no other."""
        if chat.pinned is None:
            return
        sampled = {int(version) for completion in result.completions for version in completion.versions}
        if self._engine.version != chat.pinned or sampled - {chat.pinned, -1}:
            raise RefusedError(
                409,
                f"version {chat.pinned} gave way to version {self._engine.version} before the answer was finished; "
                "ask for that one, or for any by its name alone",
            )

    def _request(self, fields: Body, *, streaming: bool) -> Request:
        prompt = self._render([_message(message) for message in fields.objects("messages")])
        limit = "max_completion_tokens" if fields.has("max_completion_tokens") else "max_tokens"
        sampling = sampling_of(fields, default_max=max(self._engine.length - len(prompt), 1), limit=limit)
        n = fields.integer("n", 1, low=1, high=MAX_SIBLINGS)
        return checked(self._engine, prompt, sampling, n=n, stop=self._renderer.stop_tokens, streaming=streaming)

    def _render(self, messages: Sequence[Message]) -> list[int]:
        try:
            return self._renderer.start(messages)
        except UserError as error:
            raise RefusedError(400, f"the messages cannot be rendered: {error}") from None

    # --- the answer -----------------------------------------------------------------------------------------------
    def _envelope(self, request_id: str, kind: str, model: str) -> dict[str, Any]:
        return {"id": request_id, "object": kind, "created": int(time.time()), "model": model}

    def _choice(self, index: int, completion: Completion, chat: _Chat) -> dict[str, Any]:
        tokens = completion.tokens.tolist()
        choice = {
            "index": index,
            "message": {"refusal": None, **self._renderer.parse(tokens)},
            "logprobs": {"content": self._logprobs(completion)} if chat.logprobs else None,
            "finish_reason": completion.stop.value,
        }
        return {**choice, "token_ids": tokens} if chat.token_ids else choice

    def _logprobs(self, completion: Completion) -> list[dict[str, Any]]:
        texts = [self._tokenizer.decode([token]) for token in completion.tokens.tolist()]
        return [
            {"token": text, "bytes": list(text.encode()), "logprob": logprob, "top_logprobs": []}
            for text, logprob in zip(texts, completion.logprobs.tolist(), strict=True)
        ]

    async def _stream(self, http: web.Request, chat: _Chat) -> web.StreamResponse:
        request = chat.request
        envelope = self._envelope(request.request_id, "chat.completion.chunk", chat.model)
        with self._engine.stream(request) as stream:
            events = ChatEvents(envelope, self._renderer, n=request.n)
            await events.open(http)
            while stream.result is None:
                await stream.change()
                await events.tell(stream.tokens)
            try:
                self._check_version(chat, stream.result)
            except RefusedError as refusal:
                await events.refuse(refusal)
            else:
                await events.close(stream.result, include_usage=chat.include_usage)
        return events.response


def _message(fields: Body) -> Message:
    """A chat message whose content is a string; OpenAI's list of text parts is joined."""
    role, content = fields.text("role"), fields.value("content")
    if isinstance(content, list):
        content = "".join(_part(Body(part, "content.")) for part in content)
    if not isinstance(content, str):
        raise fields.refuse("content", f"must be a string, got {type(content).__name__}")
    fields.value("name")
    fields.value("refusal")
    fields.finish()
    return {"role": role, "content": content}


def _part(fields: Body) -> str:
    if fields.text("type") != "text":
        raise fields.refuse("type", "must be 'text'")
    text = fields.value("text")
    fields.finish()
    if not isinstance(text, str):
        raise fields.refuse("text", f"must be a string, got {type(text).__name__}")
    return text
