"""From a packed micro-batch to what the losses of its streams are given.

Host-side selection of the tokens that are predicted, the concrete `LossBatch`, and the call of each stream's loss.
Knows nothing of models or optimizers; called by `prl.train.step`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prl.errors import RunError
from prl.providers import LossFunction
from prl.train.logprobs import TokenScores
from prl.train.parallel.context import ContextGroup, in_whole
from prl.types import STREAMS, Float32, MicroBatch, Stream


@attrs.define(kw_only=True, eq=False)
class LossBatch:
    """What a loss is given: `prl.providers.LossInputs`, whose comments apply."""

    trainer_logprobs: Tensor  # [N]
    engine_logprobs: Tensor  # [N]
    advantages: Tensor  # [N]
    weights: Tensor  # [N]
    sample_ids: Tensor  # [N] int64
    sample_count: int
    staleness: Tensor  # [N] int64
    entropy: Tensor | None = None  # [N]
    ref_logprobs: Tensor | None = None  # [N]


@attrs.frozen(kw_only=True)
class StreamLoss:
    """The loss a run has chosen for a stream."""

    function: LossFunction
    needs: frozenset[str] = frozenset()


@attrs.frozen(kw_only=True, eq=False)
class PredictedTokens:
    """The `N` tokens of a micro-batch that are scored: sampled, or of any stream, and not the first of their sample."""

    rows: Tensor  # [N] int64, position of the state that predicts each token
    targets: Tensor  # [N] int64
    temperatures: Tensor  # [N]
    advantages: Tensor  # [N]
    engine_logprobs: Tensor  # [N]
    sampled: Tensor  # [N] bool
    staleness: Tensor  # [N] int64, 0 where nothing was sampled
    sample_ids: Tensor  # [N] int64
    sample_count: int
    weights: Mapping[Stream, Tensor]  # [N] each, only streams that occur here
    ref_logprobs: Tensor | None  # [N]

    @property
    def fresh(self) -> Tensor:
        """[N] bool, sampled, in a sample with no token older than the version being trained."""
        stale = torch.zeros(self.sample_count, dtype=torch.bool, device=self.sampled.device)
        stale[self.sample_ids[self.staleness != 0]] = True
        return self.sampled & ~stale[self.sample_ids]

    def loss_batch(self, stream: Stream, scores: TokenScores, needs: frozenset[str]) -> LossBatch:
        """The inputs of one stream's loss; optional columns only where `needs` names them."""
        if "ref_logprobs" in needs and self.ref_logprobs is None:
            raise RunError(f"the loss of the {stream} stream needs ref_logprobs, and the batch brings none")
        return LossBatch(
            trainer_logprobs=scores.logprobs,
            engine_logprobs=self.engine_logprobs,
            advantages=self.advantages,
            weights=self.weights[stream],
            sample_ids=self.sample_ids,
            sample_count=self.sample_count,
            staleness=self.staleness,
            entropy=scores.entropy if "entropy" in needs else None,
            ref_logprobs=self.ref_logprobs if "ref_logprobs" in needs else None,
        )


def predicted_tokens(micro: MicroBatch, version: int, device: torch.device) -> PredictedTokens:
    """Select the tokens of `micro` that are scored when `version` is trained.

    Under a shard every stream of the batch stays, whether it occurs here or not: other ranks may have tokens of it.
    """
    lengths = np.diff(micro.cu_seqlens)
    first = _first_token(micro)
    sample_ids = np.repeat(np.arange(len(lengths)), lengths)[first : first + len(micro.tokens)]
    chosen = np.flatnonzero(is_scored(micro))

    def column(values: NDArray[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values[chosen], dtype=dtype, device=device)

    return PredictedTokens(
        rows=torch.tensor(chosen - 1, device=device),
        targets=column(micro.tokens, torch.int64),
        temperatures=column(micro.temperatures, torch.float32),
        advantages=column(micro.advantages, torch.float32),
        engine_logprobs=column(micro.engine_logprobs, torch.float32),
        sampled=column(micro.sampled, torch.bool),
        staleness=column(np.where(micro.sampled, version - micro.versions, 0), torch.int64),
        sample_ids=column(sample_ids, torch.int64),
        sample_count=len(lengths),
        weights={
            stream: column(weights, torch.float32)
            for stream, weights in micro.weights.items()
            if micro.shard is not None or weights[chosen].any()
        },
        ref_logprobs=None if micro.ref_logprobs is None else column(micro.ref_logprobs, torch.float32),
    )


def is_scored(micro: MicroBatch) -> NDArray[np.bool_]:
    """[T] True for tokens that someone wants to know about and that have a predecessor in their sample."""
    scored = micro.sampled.copy()
    for weights in micro.weights.values():
        scored |= weights != 0
    starts = micro.cu_seqlens[:-1] - _first_token(micro)
    scored[starts[(starts >= 0) & (starts < len(scored))]] = False
    scored[:1] = False  # under a shard, the rank before has the state that predicts it
    return scored


def _first_token(micro: MicroBatch) -> int:
    """Number of the columns' first token in the packed whole."""
    return 0 if micro.shard is None else micro.shard.index * micro.shard.rows


def brought_together(
    tokens: PredictedTokens, scores: TokenScores, context: ContextGroup
) -> tuple[PredictedTokens, TokenScores]:
    """The scored tokens of all ranks of a context group; gradients flow through this rank's own.

    What only scoring needs (rows, targets, temperatures) stays this rank's.
    """
    names = ("advantages", "engine_logprobs", "sampled", "staleness", "sample_ids", "ref_logprobs")
    columns: dict[Any, Tensor | None] = {name: getattr(tokens, name) for name in names}
    columns["logprobs"], columns["entropy"] = scores.logprobs.detach(), scores.entropy
    columns.update(tokens.weights)
    there = {name: column for name, column in columns.items() if column is not None}
    # float64 holds each of these exactly.
    whole, place = context.columns(torch.stack([column.double() for column in there.values()], 1))
    seen: dict[Any, Any] = {
        name: part.to(column.dtype) for (name, column), part in zip(there.items(), whole.unbind(1), strict=True)
    }
    logprobs = in_whole(scores.logprobs, seen.pop("logprobs"), place)
    entropy = seen.pop("entropy", None)
    weights: dict[Stream, Tensor] = {stream: seen.pop(stream) for stream in tokens.weights}
    occurring = {stream: column for stream, column in weights.items() if column.any()}
    return attrs.evolve(tokens, **seen, weights=occurring), TokenScores(logprobs, entropy)


def stream_losses(
    losses: Mapping[Stream, StreamLoss], tokens: PredictedTokens, *, scores: TokenScores, step: int
) -> Iterator[tuple[Stream, Tensor, Mapping[str, Tensor]]]:
    """(stream, SUM of its loss over this micro-batch, summed metrics) of every stream with a token in it."""
    for stream in STREAMS:
        if stream not in tokens.weights:
            continue
        if stream not in losses:
            raise RunError(f"step {step} has tokens of the {stream} stream, and losses.{stream} is not set")
        chosen = losses[stream]
        output = chosen.function(tokens.loss_batch(stream, scores, chosen.needs))
        yield stream, output.loss, output.metrics


def no_tokens() -> MicroBatch:
    """A micro-batch of one token without weight: with it, a rank that has no work joins every collective."""
    nothing: Float32 = np.zeros(1, dtype=np.float32)
    return MicroBatch(
        tokens=np.zeros(1, dtype=np.int32),
        cu_seqlens=np.array([0, 1], dtype=np.int32),
        temperatures=nothing,
        advantages=nothing,
        engine_logprobs=nothing,
        versions=np.full(1, -1, dtype=np.int32),
        sampled=np.zeros(1, dtype=np.bool_),
        weights={},
    )
