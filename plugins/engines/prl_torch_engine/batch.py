"""The sequences that decode: rows `0 .. n - 1`, always contiguous, so that attention uses the caches by view.

Everything that happens per token is one operation over a window of rows; Python touches a single sequence only when it
joins, when it leaves, and when the weights change. Called by `scheduler.py`.
"""

from __future__ import annotations

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from prl.blocks import invariance
from prl.blocks.context import Context
from prl.blocks.linear import linear
from prl.errors import InfrastructureError
from prl.providers import LanguageModel
from prl.serve.requests import MAX_STOPS
from prl.types import Completion, Float32, Int32, Routes, StopReason
from torch import Tensor

from prl_torch_engine.jobs import Job, Sequence
from prl_torch_engine.rows import Rows
from prl_torch_engine.sampling import GOLDEN, draw, stream, uniforms

_LAST, _LIMIT, _MINIMUM = range(3)


@attrs.define(kw_only=True)
class Window:
    """Views of consecutive rows, and what the host knows about them without asking the device.

    Valid until a sequence joins or leaves.
    """

    start: int
    size: int
    past: Tensor  # [n] tokens in the caches
    base: Tensor  # [n] index of the row's first entry in the flat token matrix
    last: Tensor  # [n] the token to compute next
    limit: Tensor  # [n] position of the last token the sequence may have
    minimum: Tensor  # [n] first position at which a stop token may be sampled
    stops: Tensor  # [n, k] stop tokens, -1 where a row has fewer
    counters: NDArray[np.uint64]  # [n] of the random streams, before the next token
    scale: Tensor | None  # [n, 1] temperatures, None when all are 1
    greedy: Tensor | None  # [n] rows that take the most likely token, None when there are none
    barred_steps: int
    """Steps during which some row may not stop yet."""
    all_barred_steps: int
    """Steps during which no row may."""
    past_min: int
    past_max: int
    lengths: tuple[int, ...]


class Batch:
    """Joins, decodes and releases sequences."""

    def __init__(self, model: LanguageModel, rows: Rows, *, capacity: int) -> None:
        self._model = model
        self._rows = rows
        device = rows.tokens.device
        self._tokens = rows.tokens.view(-1)
        self._logprobs = torch.zeros(capacity, rows.length, device=device)
        self._base = torch.arange(capacity, device=device) * rows.length
        self._integers = torch.zeros(3, capacity, dtype=torch.int64, device=device)
        self._stops = torch.full((capacity, MAX_STOPS), -1, dtype=torch.int64, device=device)
        self._temperatures = torch.ones(capacity, device=device)
        self._counters = np.zeros(capacity, dtype=np.uint64)
        self._decoding: Window | None = None
        self.capacity = capacity
        self.sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self.sequences)

    # --- joining --------------------------------------------------------------------------------------------------
    def join(self, job: Job, version: int) -> range:
        """Rows for the members of a job whose prompt is computed; their first token is still to be sampled."""
        first, request = len(self.sequences), job.pending.request
        added = range(first, first + len(job.members))
        for member, row in zip(job.members, added, strict=True):
            self._rows.copy(job.row, row, len(request.prompt))
            self._counters[row] = stream(request.sampling.seed + member, len(request.prompt))
            self.sequences.append(Sequence(pending=job.pending, member=member, spans=[(0, version)]))
        self._describe(slice(added.start, added.stop), job)
        self._decoding = None
        return added

    def _describe(self, rows: slice, job: Job) -> None:
        """What the members of a job have in common."""
        request, length = job.pending.request, len(job.pending.request.prompt)
        limit = min(length + request.sampling.max_tokens, self._rows.length) - 1
        self._integers[_LIMIT, rows] = limit
        self._integers[_MINIMUM, rows] = length + request.sampling.min_tokens if request.stop else 0
        self._temperatures[rows] = request.sampling.temperature
        padded = [*request.stop, *[request.stop[0] if request.stop else -1] * (MAX_STOPS - len(request.stop))]
        self._stops[rows] = torch.tensor(padded, device=self._stops.device)

    def window(self, start: int, stop: int) -> Window:
        rows = slice(start, stop)
        past, temperatures = self._rows.past[rows], self._temperatures[rows]
        greedy = temperatures == 0
        scale = temperatures.masked_fill(greedy, 1.0)[:, None]
        minimum = self._integers[_MINIMUM, rows]
        width = max(len(s.pending.request.stop) for s in self.sequences[rows])
        return Window(
            start=start,
            size=stop - start,
            past=past,
            base=self._base[rows],
            last=self._integers[_LAST, rows],
            limit=self._integers[_LIMIT, rows],
            minimum=minimum,
            stops=self._stops[rows, : max(width, 1)],
            counters=self._counters[rows],
            scale=scale if bool((scale != 1.0).any()) else None,
            greedy=greedy if bool(greedy.any()) else None,
            barred_steps=int((minimum - past).max()),
            all_barred_steps=int((minimum - past).min()),
            past_min=int(past.min()),
            past_max=int(past.max()),
            lengths=(1,) * (stop - start),
        )

    # --- one token per row ----------------------------------------------------------------------------------------
    def decode(self) -> list[int]:
        """Every sequence gets one more token; rows of the sequences that ended, ascending."""
        window = self._decoding
        if window is None:
            window = self._decoding = self.window(0, len(self.sequences))
        context = Context(
            lengths=window.lengths,
            positions=window.past,
            caches=self._rows.caches,
            rows=slice(0, window.size),
            past=window.past,
            past_min=window.past_min,
            past_max=window.past_max,
            longest=invariance.enough_keys(window.past_max + 1, self._rows.length),
            decoding=True,
        )
        hidden = self._rows.hidden(self._model, window.last, context)
        window.past += 1
        window.past_min += 1
        window.past_max += 1
        return self.append(window, linear(hidden, self._model.head()))

    def append(self, window: Window, logits: Tensor) -> list[int]:
        """Sample the token after the `past` computed ones of each row from `logits` [n, vocab], which may change."""
        logprobs = self._distribution(window, logits.float())
        tokens = self._draw(window, logprobs)
        places = window.base + window.past
        self._tokens.scatter_(0, places, tokens)
        self._logprobs.view(-1).scatter_(0, places, logprobs.gather(1, tokens[:, None])[:, 0])
        window.last.copy_(tokens)
        ended = (window.stops == tokens[:, None]).any(1) | (window.past >= window.limit)
        return (ended.nonzero()[:, 0] + window.start).tolist() if bool(ended.any()) else []

    def _distribution(self, window: Window, logits: Tensor) -> Tensor:
        """[n, vocab] log-probabilities the rows sample from."""
        if window.scale is not None:
            logits = logits / window.scale
        if window.barred_steps > 0:
            self._bar(window, logits)
        return logits.log_softmax(1)

    def _bar(self, window: Window, logits: Tensor) -> None:
        """Rows that may not stop yet cannot sample a stop token."""
        stops = window.stops.clamp(min=0)
        if window.all_barred_steps > 0:
            logits.scatter_(1, stops, -torch.inf)
        else:
            barred = (window.past < window.minimum)[:, None]
            logits.scatter_(1, stops, logits.gather(1, stops).masked_fill(barred, -torch.inf))
        window.barred_steps -= 1
        window.all_barred_steps -= 1

    def _draw(self, window: Window, logprobs: Tensor) -> Tensor:
        uniform = torch.from_numpy(uniforms(window.counters)).to(logprobs.device)
        window.counters += np.uint64(GOLDEN)
        tokens = draw(logprobs, uniform)
        if window.greedy is not None:
            tokens = logprobs.argmax(1).where(window.greedy, tokens)
        return tokens

    # --- leaving --------------------------------------------------------------------------------------------------
    def sampled(self, row: int) -> int:
        """Tokens the sequence in `row` has so far."""
        return int(self._rows.past[row]) + 1 - len(self.sequences[row].pending.request.prompt)

    def tokens(self, row: int) -> Int32:
        """[sampled] the tokens so far."""
        start, count = len(self.sequences[row].pending.request.prompt), self.sampled(row)
        return self._rows.tokens[row, start : start + count].to(torch.int32).cpu().numpy()

    def completion(self, row: int, stop: StopReason) -> Completion:
        """What the sequence in `row` has become."""
        sequence, tokens = self.sequences[row], self.tokens(row)
        start = len(sequence.pending.request.prompt)
        logprobs: Float32 = self._logprobs[row, start : start + len(tokens)].cpu().numpy().copy()
        if not np.isfinite(logprobs).all():
            raise InfrastructureError(
                f"the model's logits are not finite at policy version {sequence.spans[-1][1]}: training has diverged, "
                "or the weights are damaged"
            )
        return Completion(
            tokens=tokens,
            logprobs=logprobs,
            versions=_versions(sequence, len(tokens)),
            stop=stop,
            routes=self._routes(row),
        )

    def _routes(self, row: int) -> Routes | None:
        """Of every token of the sequence in `row` that was computed, from where the request wants them."""
        first = self.sequences[row].pending.request.routes_from
        if first is None or self._rows.routes is None:
            return None
        return self._rows.routes.read(row, first, int(self._rows.past[row]))

    def stop_reason(self, row: int) -> StopReason:
        """Why the sequence in `row` ended."""
        stopped = int(self._integers[_LAST, row]) in self.sequences[row].pending.request.stop
        return StopReason.STOP if stopped else StopReason.LENGTH

    def leave(self, row: int) -> None:
        """Forget the sequence in `row`; the last row takes its place."""
        last = len(self.sequences) - 1
        sequence = self.sequences.pop()
        if row != last:
            self.sequences[row] = sequence
            self._move(last, row)
        self._rows.stamps[last] = -1
        self._decoding = None

    def _move(self, source: int, target: int) -> None:
        past = int(self._rows.past[source])
        self._rows.copy(source, target, past)
        # The newest token is sampled but not computed, so it is not part of what `copy` copies.
        self._rows.tokens[target, past] = self._rows.tokens[source, past]
        self._logprobs[target, : past + 1] = self._logprobs[source, : past + 1]
        for state in (self._stops, self._temperatures, self._counters):
            state[target] = state[source]
        self._integers[:, target] = self._integers[:, source]


def _versions(sequence: Sequence, count: int) -> Int32:
    """[count] the policy version that sampled each token, from the spans."""
    starts = [start for start, _ in sequence.spans]
    lengths = np.diff([*starts, count])
    return np.repeat(np.array([v for _, v in sequence.spans], dtype=np.int32), lengths)
