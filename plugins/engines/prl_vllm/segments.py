"""Continuations across weight updates, on releases of vLLM that do not say which version sampled a token.

Before weights change every request is aborted, which gives its tokens so far; afterwards each continuation goes on from
there in a request of its own. So each request lies within one version. Keys and values are computed again, and a
seeded continuation draws from another seed after the change.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection

import attrs
import numpy as np
from prl.types import Completion, Routes, StopReason

from prl_vllm.api import Answer, Ask

Send = Callable[[Ask], Awaitable[Answer]]
"""Waits until weights have changed, and sends with the salt of the version served then."""


async def in_segments(ask: Ask, send: Send, aborted: Collection[str]) -> Answer:
    """The whole of every continuation; `aborted` are the requests that somebody wants to end early."""
    first = await send(ask)
    async with asyncio.TaskGroup() as tasks:
        rest = [tasks.create_task(_finish(ask, member, c, send, aborted)) for member, c in enumerate(first.completions)]
    return attrs.evolve(first, completions=tuple(task.result() for task in rest))


async def _finish(ask: Ask, member: int, done: Completion, send: Send, aborted: Collection[str]) -> Completion:
    while done.stop is StopReason.ABORT and ask.request_id not in aborted:
        (more,) = (await send(_remaining(ask, member, done))).completions
        done = Completion(
            tokens=np.concatenate([done.tokens, more.tokens]),
            logprobs=np.concatenate([done.logprobs, more.logprobs]),
            versions=np.concatenate([done.versions, more.versions]),
            stop=more.stop,
            routes=joined(done.routes, more.routes),
        )
    return done


def joined(first: Routes | None, more: Routes | None) -> Routes | None:
    """Routes of both, each token's by whoever computed it first."""
    if first is None or more is None:
        return first or more
    new = max(first.start + len(first.versions) - more.start, 0)
    return attrs.evolve(
        first,
        experts=np.concatenate([first.experts, more.experts[new:]]),
        versions=np.concatenate([first.versions, more.versions[new:]]),
    )


def _remaining(ask: Ask, member: int, done: Completion) -> Ask:
    """What is left of one continuation."""
    count, sampling = len(done.tokens), ask.sampling
    return attrs.evolve(
        ask,
        request_id=f"{ask.request_id}-{member}-{count}",
        prompt=[*ask.prompt, *done.tokens.tolist()],
        sampling=attrs.evolve(
            sampling,
            max_tokens=sampling.max_tokens - count,
            min_tokens=max(sampling.min_tokens - count, 0),
            seed=(sampling.seed + member + 0x9E3779B97F4A7C15 * count) % (1 << 63),  # no two segments share a seed
        ),
        n=1,
    )
