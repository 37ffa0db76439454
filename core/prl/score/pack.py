"""Samples become a batch: micro-batches without padding, the same number for every rank, and the global denominators.

Called by the controller for every step. Deterministic: equal samples in equal order give equal batches. How samples are
split does not change the gradient, because losses are sums and `token_counts` counts the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import attrs
import numpy as np
from numpy.typing import NDArray

from prl.errors import RunError
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
) -> Batch:
    """One optimizer step's batch for `ranks` trainer ranks, of which each `context` neighbours share their sequences.

    No rank is given more than `micro_batch_tokens` tokens at a time, unless by a single sample. Raises RunError for a sample
    whose first token is weighted: nothing precedes it, so it has no log-probability.
    """
    streams = _streams(samples)
    groups = ranks // context
    bins = split_to_multiple(first_fit_decreasing(samples, micro_batch_tokens * context), samples, groups)
    with_reference = any(sample.ref_logprobs is not None for sample in samples)
    assigned = [
        [_micro_batch([samples[i] for i in chosen], streams, with_reference) for chosen in group]
        for group in balance(bins, samples, groups)
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


# --- which sample goes where: a bin is a list of sample numbers ----------------------------------------------------
def first_fit_decreasing(samples: Sequence[Sample], capacity: int) -> list[list[int]]:
    """Longest first, each into the first bin with room; at most 11/9 of the fewest bins + 6/9 (Dosa 2007)."""
    order = sorted(range(len(samples)), key=lambda i: (-len(samples[i]), i))
    bins: list[list[int]] = []
    room: list[int] = []
    for i in order:
        length = len(samples[i])
        target = next((b for b, free in enumerate(room) if free >= length), len(bins))
        if target == len(bins):
            bins.append([])
            room.append(capacity)
        bins[target].append(i)
        room[target] -= length
    return bins


def split_to_multiple(bins: list[list[int]], samples: Sequence[Sample], ranks: int) -> list[list[int]]:
    """Halve the heaviest bins until their number is a multiple of `ranks` or none can be halved.

    Two halves cost less than the same tokens on one rank while the others wait on an empty micro-batch.
    """
    bins = list(bins)
    while len(bins) % ranks:
        heaviest = max(range(len(bins)), key=lambda b: (len(bins[b]) > 1, _tokens(bins[b], samples), -b))
        if len(bins[heaviest]) < 2:
            break
        bins[heaviest : heaviest + 1] = _spread(bins[heaviest], 2, weight=lambda i: len(samples[i]))
    return bins


def balance(bins: Sequence[list[int]], samples: Sequence[Sample], ranks: int) -> list[list[list[int]]]:
    """Bins of each rank: equally many (filled up with empty ones), about equally many tokens."""
    indices = _spread(range(len(bins)), ranks, weight=lambda b: _tokens(bins[b], samples))
    most = -(-len(bins) // ranks)
    return [[sorted(bins[b]) for b in chosen] + [[]] * (most - len(chosen)) for chosen in indices]


def _spread(items: Sequence[int], parts: int, *, weight: Callable[[int], int]) -> list[list[int]]:
    """Heaviest first, each to the lightest of `parts` that has fewer than its share of the number of items."""
    most = -(-len(items) // parts)
    chosen: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for item in sorted(items, key=lambda i: (-weight(i), i)):
        target = min((p for p in range(parts) if len(chosen[p]) < most), key=lambda p: (loads[p], p))
        chosen[target].append(item)
        loads[target] += weight(item)
    return chosen


def _tokens(chosen: Sequence[int], samples: Sequence[Sample]) -> int:
    return sum(len(samples[i]) for i in chosen)


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
    return attrs.evolve(
        whole, **columns, weights=weights, shard=ContextShard(index=index, count=count, rows=rows)
    )


def round_up(count: int) -> int:
    """The next number of tokens of which few occur; at most 1/32 more.

    Kernels that are prepared for each shape (oneDNN's primitives, megabytes each; compiled ones) are then prepared
    once.
    """
    return count + -count % (1 << max(0, count.bit_length() - 6))


def _large_names(samples: Sequence[Sample]) -> list[str]:
    return sorted({name for sample in samples for name in sample.large})
