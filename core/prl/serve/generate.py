"""`POST /inference/v1/generate`: tokens in, tokens out, in the shape of vLLM's endpoint of that name."""

from __future__ import annotations

import secrets
from itertools import pairwise
from typing import Any

import numpy as np
from aiohttp import web

from prl.serve import body
from prl.serve.body import Body
from prl.serve.columns import MEDIA_TYPE, Completions, pack
from prl.serve.engine import Engine, ResumableEngine
from prl.serve.refusal import RefusedError
from prl.serve.requests import MAX_SIBLINGS, MAX_STOPS, Request, Result, checked
from prl.types import Completion, Sampling

MAX_SEED = (1 << 63) - 1
MAX_TOKENS = (1 << 31) - 1


def sampling_of(params: Body, *, default_max: int, limit: str = "max_tokens") -> Sampling:
    """The fields every endpoint has, `limit` naming the one for the most tokens; without a seed one is drawn."""
    return Sampling(
        temperature=params.number("temperature", 1.0, low=0.0, high=100.0),
        max_tokens=params.integer(limit, default_max, low=1, high=MAX_TOKENS),
        min_tokens=params.integer("min_tokens", 0, low=0, high=MAX_TOKENS),
        seed=params.integer("seed", secrets.randbits(48), low=0, high=MAX_SEED),
    )


class GenerateEndpoint:
    """Answers in JSON, or in columns when the `Accept` header asks for them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def generate(self, http: web.Request) -> web.Response:
        request, with_logprobs = self._parse(await body.read(http))
        result = await self._engine.generate(request)
        if http.headers.get("Accept") == MEDIA_TYPE:
            return web.Response(body=pack(_columns(result)), content_type=MEDIA_TYPE)
        return web.json_response(_json(result, with_logprobs=with_logprobs))

    async def so_far(self, http: web.Request) -> web.Response:
        """What a request has by now, in columns; no completions where there is no such request."""
        fields = await body.read(http)
        request_id = fields.text("request_id")
        fields.finish()
        if not isinstance(self._engine, ResumableEngine):
            raise RefusedError(501, "this engine cannot say what a request has before it is answered")
        result = await self._engine.so_far(request_id)
        return web.Response(body=pack(_columns(result)), content_type=MEDIA_TYPE)

    def _parse(self, fields: Body) -> tuple[Request, bool]:
        engine = self._engine
        params = fields.section("sampling_params")
        with_logprobs = params.has("logprobs") and params.integer("logprobs", low=0, high=0) == 0
        stop = tuple(params.integers("stop_token_ids", [], below=engine.vocab_size, most=MAX_STOPS))
        n = params.integer("n", 1, low=1, high=MAX_SIBLINGS)
        sampling = sampling_of(params, default_max=16)
        params.finish()
        request = checked(
            engine,
            fields.integers("token_ids", below=engine.vocab_size, most=engine.length),
            sampling,
            n=n,
            stop=stop,
            session=fields.text("session", ""),
            request_id=fields.text("request_id", ""),
            routes_from=_routes_from(fields, engine.length),
        )
        fields.finish()
        return request, with_logprobs


def _routes_from(fields: Body, length: int) -> int | None:
    """Answers in columns carry routes from there on; JSON has no place for them."""
    return fields.integer("routes_from", low=0, high=length) if fields.has("routes_from") else None


def _columns(result: Result) -> Completions:
    return Completions(
        request_id=result.request_id,
        completions=result.completions,
        prompt_tokens=result.prompt_tokens,
        reused_tokens=result.reused_tokens,
    )


def _json(result: Result, *, with_logprobs: bool) -> dict[str, Any]:
    choices = [_choice(i, c, with_logprobs=with_logprobs) for i, c in enumerate(result.completions)]
    return {"request_id": result.request_id, "choices": choices, "usage": usage(result)}


def _choice(index: int, completion: Completion, *, with_logprobs: bool) -> dict[str, Any]:
    tokens = completion.tokens.tolist()
    pairs = zip(tokens, completion.logprobs.tolist(), strict=True)
    content = [{"token_id": token, "logprob": logprob} for token, logprob in pairs]
    return {
        "index": index,
        "token_ids": tokens,
        "logprobs": {"content": content} if with_logprobs else None,
        "finish_reason": completion.stop.value,
        "weight_versions": _spans(completion),
    }


def _spans(completion: Completion) -> list[dict[str, int]]:
    """Which policy version sampled which tokens."""
    changes = np.flatnonzero(np.diff(completion.versions)) + 1
    bounds = [0, *changes.tolist(), len(completion.versions)]
    return [
        {"version": int(completion.versions[start]), "start": start, "end": end}
        for start, end in pairwise(bounds)
        if end > start
    ]


def usage(result: Result) -> dict[str, Any]:
    """Token counts as OpenAI's API names them."""
    sampled = sum(len(c.tokens) for c in result.completions)
    return {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": sampled,
        "total_tokens": result.prompt_tokens + sampled,
        "prompt_tokens_details": {"cached_tokens": result.reused_tokens},
    }
