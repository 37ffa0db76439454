"""What is asked of the engine and what it answers: plain data, shared by the server and the model's thread."""

from __future__ import annotations

import secrets

import attrs
import torch
from prl.types import Completion, Int32, Sampling
from torch import Tensor

from prl_torch_engine.refusal import RefusedError

MAX_SIBLINGS = 1024
MAX_STOPS = 16
"""Most stop tokens of one request."""
MIN_TEMPERATURE = 1e-3
"""Logits divided by less would overflow; 0 is greedy."""


@attrs.frozen(kw_only=True, eq=False)
class Request:
    """A checked request: `n` continuations of one prompt, each of which fits into a row."""

    request_id: str
    prompt: Tensor  # [P] int64, host
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
    prompt: list[int],
    sampling: Sampling,
    *,
    length: int,
    n: int,
    stop: tuple[int, ...],
    session: str = "",
    request_id: str = "",
    routes_from: int | None = None,
    streaming: bool = False,
) -> Request:
    """A request that an engine whose sequences have at most `length` tokens can serve; RefusedError says why not."""
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
        prompt=torch.tensor(prompt),
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


@attrs.define(kw_only=True, eq=False)
class Pending:
    """A request on its way through the scheduler."""

    request: Request
    started: int = 0
    """Members that were given to a job; the others wait for rows."""
    reused: int = 0
    completions: dict[int, Completion] = attrs.field(factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.completions) == self.request.n

    def result(self) -> Result:
        return Result(
            request_id=self.request.request_id,
            completions=tuple(self.completions[i] for i in range(self.request.n)),
            prompt_tokens=len(self.request.prompt),
            reused_tokens=self.reused,
        )


@attrs.define(kw_only=True, eq=False)
class Sequence:
    """One continuation while it decodes."""

    pending: Pending
    member: int
    spans: list[tuple[int, int]]
    """(first token, policy version): where the version that samples changed, ascending."""


@attrs.define(kw_only=True, eq=False)
class Job:
    """A prompt being computed in a prompt row, for `members` continuations that start from it."""

    pending: Pending
    members: range
    row: int
    done: int
    """Prompt tokens that already lie in the row."""

    @property
    def remaining(self) -> int:
        return len(self.pending.request.prompt) - self.done
