"""Samples become a batch: micro-batches without padding, the same number for every rank, and the global denominators.

Called by the controller for every step. Deterministic: equal samples in equal order give equal batches. How samples are
split does not change the gradient, because losses are sums and `token_counts` counts the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from prl.errors import RunError
from prl.types import STREAMS, Batch, MicroBatch, Sample, Stream


def pack(
    samples: Sequence[Sample],
    *,
    step: int,
    version: int,
    phase: Literal["warmup", "rl"],
    ranks: int,
    micro_batch_tokens: int,
) -> Batch:
    """One optimizer step's batch for `ranks` trainer ranks.

    No micro-batch has more than `micro_batch_tokens` tokens, unless a single sample does. Raises RunError for a sample
    whose first token is weighted: nothing precedes it, so it has no log-probability.
    """
    streams = _streams(samples)
    bins = split_to_multiple(first_fit_decreasing(samples, micro_batch_tokens), samples, ranks)
    with_reference = any(sample.ref_logprobs is not None for sample in samples)
    assigned = balance(bins, samples, ranks)
    return Batch(
        step=step,
        version=version,
        phase=phase,
        ranks=tuple(
            tuple(_micro_batch([samples[i] for i in chosen], streams, with_reference) for chosen in rank)
            for rank in assigned
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
        large={name: tuple(s.large.get(name) for s in samples) for name in _large_names(samples)},
    )


def _large_names(samples: Sequence[Sample]) -> list[str]:
    return sorted({name for sample in samples for name in sample.large})
