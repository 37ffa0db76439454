"""Requests on their way through the model: waiting, being computed, decoding. Bookkeeping of `scheduler.py`."""

from __future__ import annotations

import attrs
import torch
from prl.serve.requests import Request, Result
from prl.types import Completion
from torch import Tensor


@attrs.define(kw_only=True, eq=False)
class Pending:
    """A request on its way through the scheduler."""

    request: Request
    prompt: Tensor  # [P] int64, host
    started: int = 0
    """Members that were given to a job; the others wait for rows."""
    reused: int = 0
    completions: dict[int, Completion] = attrs.field(factory=dict)

    @classmethod
    def of(cls, request: Request) -> Pending:
        return cls(request=request, prompt=torch.from_numpy(request.prompt).long())

    @property
    def complete(self) -> bool:
        return len(self.completions) == self.request.n

    def result(self) -> Result:
        return Result(
            request_id=self.request.request_id,
            completions=tuple(self.completions[i] for i in range(self.request.n)),
            prompt_tokens=len(self.prompt),
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
        return len(self.pending.prompt) - self.done
