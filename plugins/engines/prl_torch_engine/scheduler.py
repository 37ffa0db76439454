"""Continuous batching: which prompt is computed next, which sequence decodes, what happens when one ends.

    add() -> waiting -> job (a prompt row, chunk by chunk) -> batch (decoding rows) -> finished

One `step` computes at most `prefill_tokens` of prompts and one token of every decoding sequence. A pure state machine
of the model's thread: it knows no threads, clocks or sockets. Called by `generation.py`.

Which sequences are computed together is chance: it depends on when requests arrive. With `batch_invariant` it changes
no bit of what is sampled: rows do not depend on each other (`prl.blocks.invariance`), every prompt is computed by
itself, and nothing is reused between requests.
"""

from __future__ import annotations

from collections import deque
from itertools import accumulate

import attrs
import torch
from prl.blocks import invariance
from prl.blocks.context import Context
from prl.blocks.linear import linear
from prl.compose.routing import Routing
from prl.providers import LanguageModel
from prl.serve.requests import Progress, Request, Result
from prl.types import Completion, StopReason, as_tokens
from torch import Tensor

from prl_torch_engine.batch import Batch
from prl_torch_engine.jobs import Job, Pending
from prl_torch_engine.prompts import PromptRows
from prl_torch_engine.routes import RouteTable
from prl_torch_engine.rows import Rows


class Scheduler:
    """Requests in through `add`, results out through `take`."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        sequences: int,
        retained: int,
        length: int,
        prefill_tokens: int,
        batch_invariant: bool = False,
        routing: Routing | None = None,
    ) -> None:
        """`routing` is the model's where routes can be asked for."""
        head = model.head()
        count = sequences + retained
        self._model = model
        self.rows = Rows(
            model.new_caches(count, length),
            count=count,
            length=length,
            device=head.device,
            routes=routing and RouteTable(routing, count=count, length=length, device=head.device),
        )
        self.batch = Batch(model, self.rows, capacity=sequences)
        self._prompts = PromptRows(self.rows, first=sequences, reuse=not batch_invariant)
        self._prefill_tokens = prefill_tokens
        self._invariant = batch_invariant
        self._pending: dict[str, Pending] = {}
        self._waiting: deque[Pending] = deque()
        self._jobs: deque[Job] = deque()
        self._results: list[Result] = []
        self._progress: list[Progress] = []
        self._streaming = 0
        self._unfinished = 0
        self.version = -1
        self.generated_tokens = 0
        self.prompt_tokens = 0
        self.reused_tokens = 0

    # --- from outside, between two steps --------------------------------------------------------------------------
    @property
    def busy(self) -> bool:
        return bool(self.batch or self._jobs or self._waiting)

    @property
    def waiting(self) -> int:
        """Sequences that do not decode yet."""
        return max(self._unfinished - len(self.batch), 0)

    def add(self, request: Request) -> None:
        pending = Pending.of(request)
        self._pending[request.request_id] = pending
        self._waiting.append(pending)
        self._streaming += request.streaming
        self._unfinished += request.n

    def abort(self, request_id: str) -> bool:
        """End a request where it is: its result has the tokens so far. False when there is no such request."""
        pending = self._pending.get(request_id)
        if pending is None:
            return False
        if pending in self._waiting:
            self._waiting.remove(pending)
        for job in [job for job in self._jobs if job.pending is pending]:
            self._prompts.release(job.row)
            self._jobs.remove(job)
        decoding = [row for row, s in enumerate(self.batch.sequences) if s.pending is pending]
        for row in reversed(decoding):
            self._finish(row, StopReason.ABORT)
        for member in set(range(pending.request.n)) - set(pending.completions):
            self._complete(pending, member, _nothing())
        return True

    def so_far(self, request_id: str) -> Result:
        """What a request has by now, and goes on from; nothing when there is no such request."""
        pending = self._pending.get(request_id)
        if pending is None:
            return Result(request_id=request_id, completions=(), prompt_tokens=0, reused_tokens=0)
        found = dict.fromkeys(range(pending.request.n), _nothing()) | pending.completions
        for row, sequence in enumerate(self.batch.sequences):
            if sequence.pending is pending:
                found[sequence.member] = self.batch.completion(row, StopReason.ABORT)
        return attrs.evolve(pending, completions=found).result()

    def set_version(self, version: int) -> None:
        """The weights were replaced. Sequences go on with the keys and values they have; new ones do not use them, and
        prompts being computed begin again: what is sampled after them counts as the new version's alone."""
        self.rows.generation += 1
        for job in self._jobs:
            self._begin_again(job)
        self.version = version
        if self.rows.routes is not None:
            self.rows.routes.version = version
        for row, sequence in enumerate(self.batch.sequences):
            sequence.spans.append((self.batch.sampled(row), version))

    def _begin_again(self, job: Job) -> None:
        job.done = 0
        self.rows.past[job.row] = 0
        self.rows.stamps[job.row] = self.rows.generation
        if not job.members.start:
            self.reused_tokens -= job.pending.reused
            job.pending.reused = 0

    def take(self) -> tuple[list[Result], list[Progress]]:
        """What finished, and what streaming requests have, since the last call."""
        taken = self._results, self._progress
        self._results, self._progress = [], []
        return taken

    # --- one step -------------------------------------------------------------------------------------------------
    def step(self) -> None:
        if self._waiting:
            self._start_jobs()
        with invariance.batch_invariant(self._invariant):
            if self._jobs:
                self._prefill()
            if self.batch:
                self.generated_tokens += len(self.batch)
                self._end(self.batch.decode())
        if self._streaming:
            self._report_progress()

    def _start_jobs(self) -> None:
        room = self.batch.capacity - len(self.batch) - sum(len(job.members) for job in self._jobs)
        while self._waiting and room:
            pending = self._waiting[0]
            request = pending.request
            claimed = self._prompts.claim(pending.prompt, request.session)
            if claimed is None:
                return
            row, reused = claimed
            stop = min(pending.started + room, request.n)
            members = range(pending.started, stop)
            self._jobs.append(Job(pending=pending, members=members, row=row, done=reused))
            if not pending.started:
                pending.reused = reused
                self.prompt_tokens += len(request.prompt)
                self.reused_tokens += reused
            pending.started = stop
            room -= len(members)
            if stop == request.n:
                self._waiting.popleft()

    def _prefill(self) -> None:
        """Compute the next chunks of prompts, oldest job first, and let the jobs that are complete decode."""
        chunks = self._chunks()
        together = [[chunk] for chunk in chunks] if self._invariant else [chunks]
        hidden = torch.cat([self._compute(part) for part in together])
        complete: list[tuple[Job, int]] = []
        for (job, count), end in zip(chunks, accumulate(count for _, count in chunks), strict=True):
            job.done += count
            self.rows.past[job.row] = job.done
            if not job.remaining:
                complete.append((job, end - 1))
        if complete:
            self._begin_decoding(complete, hidden)

    def _chunks(self) -> list[tuple[Job, int]]:
        """Jobs and how many tokens of each are next. Where chunks must not depend on other jobs, all but a prompt's
        last are as long as possible."""
        chunks: list[tuple[Job, int]] = []
        budget = self._prefill_tokens
        for job in self._jobs:
            if not budget or (self._invariant and budget < min(job.remaining, self._prefill_tokens)):
                break
            chunks.append((job, min(job.remaining, budget)))
            budget -= chunks[-1][1]
        return chunks

    def _compute(self, chunks: list[tuple[Job, int]]) -> Tensor:
        """[sum of counts, D] hidden states of the next `count` prompt tokens of each job."""
        tokens = torch.cat([job.pending.prompt[job.done : job.done + count] for job, count in chunks])
        context = Context.cached(
            self.rows.caches,
            lengths=[count for _, count in chunks],
            rows=torch.tensor([job.row for job, _ in chunks]),
            past=[job.done for job, _ in chunks],
        )
        return self.rows.hidden(self._model, tokens.to(self.rows.tokens.device), context)

    def _begin_decoding(self, complete: list[tuple[Job, int]], hidden: Tensor) -> None:
        """Sample the first tokens after complete prompts, each given with the place of its last token in `hidden`."""
        first = len(self.batch)
        ends: list[int] = []
        for job, end in complete:
            ends += [end] * len(self.batch.join(job, self.version))
            self._jobs.remove(job)
            self._prompts.release(job.row)
        logits = linear(hidden[torch.tensor(ends, device=hidden.device)], self._model.head())
        self.generated_tokens += len(ends)
        self._end(self.batch.append(self.batch.window(first, len(self.batch)), logits))

    # --- ends -----------------------------------------------------------------------------------------------------
    def _end(self, rows: list[int]) -> None:
        # From the last row down: the row that fills a hole has then been looked at already.
        for row in reversed(rows):
            self._finish(row, self.batch.stop_reason(row))

    def _finish(self, row: int, stop: StopReason) -> None:
        sequence = self.batch.sequences[row]
        request = sequence.pending.request
        completion = self.batch.completion(row, stop)
        if request.session and self.rows.current(row):
            self._prompts.keep(row, request.session, int(self.rows.past[row]))
        self.batch.leave(row)
        self._complete(sequence.pending, sequence.member, completion)

    def _complete(self, pending: Pending, member: int, completion: Completion) -> None:
        pending.completions[member] = completion
        self._unfinished -= 1
        if pending.complete:
            del self._pending[pending.request.request_id]
            self._streaming -= pending.request.streaming
            self._results.append(pending.result())

    def _report_progress(self) -> None:
        for row, sequence in enumerate(self.batch.sequences):
            request = sequence.pending.request
            if request.streaming:
                self._progress.append(
                    Progress(request_id=request.request_id, member=sequence.member, tokens=self.batch.tokens(row))
                )


def _nothing() -> Completion:
    """An aborted continuation that had not begun."""
    empty = as_tokens([])
    return Completion(tokens=empty, logprobs=empty.astype("float32"), versions=empty, stop=StopReason.ABORT)
