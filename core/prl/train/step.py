"""One optimizer step: micro-batches in, moved parameters and summed metrics out.

    for each micro-batch:   hidden states -> log-probabilities -> one loss per stream -> backward
    once:                   clip the gradient to a global norm, move the parameters

The loss is the sum over streams of (sum over all tokens of the batch) / (global token count of the stream): packing,
order, micro-batch split and number of ranks do not change the gradient. Knows nothing of processes or messages; called
by `prl.train.worker`.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor

from prl.blocks.context import Context, SharedPrefixes
from prl.errors import RunError
from prl.train import offload
from prl.train.logprobs import TokenScores, token_scores
from prl.train.parallel.context import ContextGroup
from prl.train.parallel.gradients import clip_gradients, sum_undivided
from prl.train.routes import RouteReader
from prl.train.rows import Rows, rows_of
from prl.train.streams import (
    PredictedTokens,
    StreamLoss,
    brought_together,
    no_tokens,
    predicted_tokens,
    stream_losses,
)
from prl.types import Batch, MicroBatch, Stream


@attrs.frozen(kw_only=True)
class StepReport:
    """What one rank knows after a step; names are those of docs/architecture.md, `sums` before division."""

    sums: Mapping[str, float]
    values: Mapping[str, float]
    seconds: Mapping[str, float]
    peaks: Mapping[str, float] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True, eq=False)
class Stepper:
    """A model, its losses and its optimizer: everything a step needs but the batch."""

    model: Any
    """An nn.Module that is a `prl.providers.LanguageModel`, sharded or not."""
    optimizer: torch.optim.Optimizer
    losses: Mapping[Stream, StreamLoss]
    logprob_chunk: int
    max_grad_norm: float
    device: torch.device
    compiled: bool = False
    """Compile what is done with the logits."""
    optimizer_offload: bool = False
    """Keep the optimizer's state in host memory between steps."""
    context: ContextGroup | None = None
    """Who shares this rank's sequences, and reports their sums if it is the first of them."""
    routes: RouteReader | None = None
    """Where the engine's choices of experts are replayed."""

    def step(self, batch: Batch, micro_batches: Sequence[MicroBatch], learning_rate: float) -> StepReport:
        """Train on this rank's `micro_batches`; every rank must bring the same number of them (they may be empty)."""
        started = time.perf_counter()
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=self.device))
        for micro in micro_batches:
            self._accumulate(micro if len(micro.tokens) or micro.shard else no_tokens(), batch, sums)
        computed = time.perf_counter()
        grad_norm = self._move(batch.step, learning_rate)
        if self.context is not None and self.context.index:
            # Losses saw all ranks' tokens; routes are counted where they are followed.
            sums = {name: total for name, total in sums.items() if name.startswith("routes")}
        totals = torch.stack(list(sums.values())).tolist() if sums else []
        return StepReport(
            sums=dict(zip(sums, totals, strict=True)),
            values={"grad_norm": grad_norm, "learning_rate": learning_rate},
            seconds={"forward_backward": computed - started, "optimizer": time.perf_counter() - computed},
        )

    def _accumulate(self, micro: MicroBatch, batch: Batch, sums: dict[str, Tensor]) -> None:
        """Forward and backward of one micro-batch; its sums are added to `sums`."""
        tokens = predicted_tokens(micro, batch.version, self.device)
        scores = self._score(micro, tokens, batch.version, sums)
        if self.context is not None:
            tokens, scores = brought_together(tokens, scores, self.context)
        # A sum over nothing: connects every parameter to the loss, so that a rank whose micro-batch trains no token
        # still takes part in the collectives of the backward pass.
        total = scores.logprobs[:0].sum()
        for stream, loss, metrics in stream_losses(self.losses, tokens, scores=scores, step=batch.step):
            total = total + loss / batch.token_counts[stream]
            sums[f"loss/{stream}"] += loss.detach()
            for name, value in metrics.items():
                sums[f"loss/{stream}/{name}"] += value
        total.backward()  # type: ignore[no-untyped-call]
        _add_diagnostics(tokens, scores, sums)

    def _score(self, micro: MicroBatch, tokens: PredictedTokens, version: int, sums: dict[str, Tensor]) -> TokenScores:
        rows = rows_of(micro, share=getattr(self.model, "shares_prefixes", False))
        shared = self._shared(rows)
        with self.device:
            context = Context.packed(torch.tensor(rows.cu_seqlens, device="cpu"), shared, shard=self.context)
        replaying = None
        if self.routes is not None and (micro.large or micro.sampled.any()):
            replaying = self.routes.read(micro)
            context.routes = replaying.log(rows, self.device)
        hidden = self.model.hidden(torch.tensor(rows.tokens, dtype=torch.int64, device=self.device), context)
        if replaying is not None and context.routes is not None:
            replaying.add_sums(context.routes, shared, version, sums)
        return token_scores(
            hidden.index_select(0, tokens.rows if shared is None else shared.source[tokens.rows]),
            self.model.head(),
            targets=tokens.targets,
            temperatures=tokens.temperatures,
            chunk=self.logprob_chunk,
            compiled=self.compiled,
            entropy="rl" in tokens.weights or any("entropy" in loss.needs for loss in self.losses.values()),
        )

    def _shared(self, rows: Rows) -> SharedPrefixes | None:
        if rows.source is None or rows.kept is None:
            return None
        return SharedPrefixes(*(torch.tensor(index, device=self.device) for index in (rows.source, rows.kept)))

    def _move(self, step: int, learning_rate: float) -> float:
        """Clip, step, forget the gradient; returns the gradient's norm before clipping."""
        sum_undivided(self.model.parameters())
        grad_norm = clip_gradients(self.model.parameters(), self.max_grad_norm)
        if not math.isfinite(grad_norm):
            raise RunError(f"the gradient of step {step} has norm {grad_norm}: the weights were left as they are")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with offload.at_hand(self.optimizer) if self.optimizer_offload else nullcontext():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm


@torch.no_grad()
def _add_diagnostics(tokens: PredictedTokens, scores: TokenScores, sums: dict[str, Tensor]) -> None:
    """Trainer-engine mismatch over sampled tokens and entropy over the rl stream, as sums and counts."""
    if scores.entropy is not None and "rl" in tokens.weights:
        in_stream = tokens.weights["rl"] != 0
        sums["entropy"] += scores.entropy[in_stream].sum()
        sums["entropy/count"] += in_stream.sum()
    for name, chosen in (("mismatch", tokens.sampled), ("mismatch_fresh", tokens.fresh)):
        if chosen.any():
            difference = scores.logprobs[chosen].double() - tokens.engine_logprobs[chosen].double()
            # k3 of Schulman 2020, "Approximating KL divergence"; expm1 in float64, where exp(d) - d - 1 would cancel.
            sums[f"{name}/k3"] += (difference.expm1() - difference).sum()
            sums[f"{name}/count"] += len(difference)
