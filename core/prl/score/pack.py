"""Samples become a batch: micro-batches without padding, the same number for every rank, and the global denominators.

Called by the controller for every step. Deterministic: equal samples in equal order give equal batches. How samples are
split does not change the gradient, because losses are sums and `token_counts` counts the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import attrs
import numpy as np
from numpy.typing import NDArray

from prl.errors import RunError
from prl.score.bins import assign
from prl.score.costs import BY_TOKENS, Costs
from prl.types import STREAMS, Batch, ContextShard, MicroBatch, Sample, Stream

_FEWEST_ROWS = 8
"""Of a rank that shares sequences: more than a causal convolution looks back on."""


def pack(
    samples: Sequence[Sample],
    *,
    step: int,
    version: int,
    phase: Literal["warmup", "rl"],
    ranks: int,
    micro_batch_tokens: int,
    context: int = 1,
    costs: Costs = BY_TOKENS,
) -> Batch:
    """One optimizer step's batch for `ranks` trainer ranks, of which each `context` neighbours share their sequences.

    No rank is given more than `micro_batch_tokens` tokens at a time, unless by a single sample. Raises RunError for a
    sample whose first token is weighted: nothing precedes it, so it has no log-probability. What is computed at the
    same time is of about the same `costs`.
    """
    streams = _streams(samples)
    groups = ranks // context
    lengths = [len(sample) for sample in samples]
    assigned_bins = assign(lengths, costs.of(lengths), groups, capacity=micro_batch_tokens * context)
    with_reference = any(sample.ref_logprobs is not None for sample in samples)
    assigned = [
        [_micro_batch([samples[i] for i in chosen], streams, with_reference) for chosen in group]
        for group in assigned_bins
    ]
    return Batch(
        step=step,
        version=version,
        phase=phase,
        ranks=tuple(
            tuple(share(micro, index, context) for micro in micro_batches)
            for micro_batches in assigned
            for index in range(context)
        ),
        token_counts={stream: sum(_count(sample, stream) for sample in samples) for stream in streams},
    )


def _streams(samples: Sequence[Sample]) -> tuple[Stream, ...]:
    """Streams that have a token somewhere, in the order of `STREAMS`."""
    for number, sample in enumerate(samples):
        if len(sample) and any(weights[0] for weights in sample.weights.values()):
            raise RunError(f"sample {number}: its first token has a weight, but no token precedes it to predict it")
    return tuple(stream for stream in STREAMS if any(_count(sample, stream) for sample in samples))


def _count(sample: Sample, stream: Stream) -> int:
    weights = sample.weights.get(stream)
    return 0 if weights is None else int(np.count_nonzero(weights))


# --- columns ----------------------------------------------------------------------------------------------------------
def _micro_batch(samples: Sequence[Sample], streams: Sequence[Stream], with_reference: bool) -> MicroBatch:
    lengths = [len(sample) for sample in samples]

    def column(dtype: Any, columns: Iterable[NDArray[Any] | None]) -> NDArray[Any]:
        """[T] the samples' columns end to end; None stands for zeros."""
        parts = [np.zeros(n, dtype) if c is None else c for n, c in zip(lengths, columns, strict=True)]
        return np.concatenate(parts, dtype=dtype) if parts else np.zeros(0, dtype)

    return MicroBatch(
        tokens=column(np.int32, (s.tokens for s in samples)),
        cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
        temperatures=np.repeat(np.array([s.temperature for s in samples], dtype=np.float32), lengths),
        advantages=column(np.float32, (s.advantages for s in samples)),
        engine_logprobs=column(np.float32, (s.engine_logprobs for s in samples)),
        versions=column(np.int32, (s.versions for s in samples)),
        sampled=column(np.bool_, (s.sampled for s in samples)),
        weights={stream: column(np.float32, (s.weights.get(stream) for s in samples)) for stream in streams},
        ref_logprobs=column(np.float32, (s.ref_logprobs for s in samples)) if with_reference else None,
        large={name: tuple(s.large.get(name, ()) for s in samples) for name in _large_names(samples)},
    )


def share(whole: MicroBatch, index: int, count: int) -> MicroBatch:
    """What rank `index` of a context group of `count` is given of a micro-batch."""
    if count == 1:
        return whole
    rows = round_up(max(-(-len(whole.tokens) // count), _FEWEST_ROWS))
    tokens = slice(index * rows, (index + 1) * rows + 1)
    columns: dict[str, Any] = {
        field.name: getattr(whole, field.name)[tokens]
        for field in attrs.fields(MicroBatch)
        if isinstance(getattr(whole, field.name), np.ndarray) and field.name != "cu_seqlens"
    }
    weights = {stream: column[tokens] for stream, column in whole.weights.items()}
    return attrs.evolve(whole, **columns, weights=weights, shard=ContextShard(index=index, count=count, rows=rows))


def round_up(count: int) -> int:
    """The next number of tokens of which few occur; at most 1/32 more.

    Kernels that are prepared for each shape (oneDNN's primitives, megabytes each; compiled ones) are then prepared
    once.
    """
    return count + -count % (1 << max(0, count.bit_length() - 6))


def _large_names(samples: Sequence[Sample]) -> list[str]:
    return sorted({name for sample in samples for name in sample.large})
