"""Which sample goes into which micro-batch of which rank: bins of about the same cost.

    first fit decreasing     how many bins are needed at least
    Karmarkar-Karp           which samples share a bin, so that bins cost about the same
    by cost                  which bins are computed at the same time: ranks meet after every micro-batch

A bin is a list of sample numbers. Pure and deterministic: equal lengths give equal bins.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TypeAlias

Bin: TypeAlias = list[int]


def assign(lengths: Sequence[int], costs: Sequence[float], ranks: int, *, capacity: int) -> list[list[Bin]]:
    """The bins of each rank: equally many, empty ones only where there are too few samples. `costs`: of each sample.

    No bin has more than `capacity` tokens, unless by a single sample.
    """
    bins = _balanced(lengths, costs, ranks, capacity)
    bins.sort(key=lambda chosen: (-sum(costs[i] for i in chosen), chosen))
    bins += [[] for _ in range(-len(bins) % ranks)]
    return [bins[rank::ranks] for rank in range(ranks)]


def _balanced(lengths: Sequence[int], costs: Sequence[float], ranks: int, capacity: int) -> list[Bin]:
    """Karmarkar-Karp's bins, as few as hold all samples, in a multiple of `ranks` where there are enough samples.

    It knows no capacity: where its bins are too full it is given more of them, and at last the bins of first fit stay.
    """
    fewest = first_fit_decreasing(lengths, capacity)
    for count in range(_multiple(len(fewest), ranks), _multiple(2 * len(fewest), ranks) + 1, ranks):
        bins = karmarkar_karp(costs, min(count, len(lengths)))
        if all(sum(lengths[i] for i in chosen) <= capacity or len(chosen) == 1 for chosen in bins):
            return bins
    return _split_to_multiple(fewest, lengths, ranks)


def _multiple(count: int, ranks: int) -> int:
    return -(-count // ranks) * ranks


def karmarkar_karp(costs: Sequence[float], count: int) -> list[Bin]:
    """`count` bins of all items with sums as equal as differencing finds them (Karmarkar and Karp 1982, many ways).

    The two partitions that are most uneven are joined, the heaviest bin of one with the lightest of the other, until
    one partition is left.
    """
    partitions = [_partition([(costs[i], [i])] + [(0.0, [])] * (count - 1), i) for i in range(len(costs))]
    heapq.heapify(partitions)
    while len(partitions) > 1:
        _, first, bins = heapq.heappop(partitions)
        _, second, others = heapq.heappop(partitions)
        joined = [
            (heavy + light, [*items, *added])
            for (heavy, items), (light, added) in zip(bins, reversed(others), strict=True)
        ]
        heapq.heappush(partitions, _partition(joined, min(first, second)))
    return [sorted(items) for _, items in partitions[0][2]] if partitions else []


def _partition(bins: list[tuple[float, Bin]], number: int) -> tuple[float, int, list[tuple[float, Bin]]]:
    """(how even, a number that decides between equals, bins with the heaviest first)"""
    bins.sort(key=lambda weighed: (-weighed[0], weighed[1]))
    return bins[-1][0] - bins[0][0], number, bins


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[Bin]:
    """Longest first, each into the first bin with room; at most 11/9 of the fewest bins + 6/9 (Dosa 2007)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins: list[Bin] = []
    room: list[int] = []
    for i in order:
        target = next((b for b, free in enumerate(room) if free >= lengths[i]), len(bins))
        if target == len(bins):
            bins.append([])
            room.append(capacity)
        bins[target].append(i)
        room[target] -= lengths[i]
    return bins


def _split_to_multiple(bins: list[Bin], lengths: Sequence[int], ranks: int) -> list[Bin]:
    """Halve the heaviest bins until their number is a multiple of `ranks` or none can be halved.

    Two halves cost less than the same tokens on one rank while the others wait on an empty micro-batch.
    """
    bins = list(bins)
    while len(bins) % ranks:
        heaviest = max(range(len(bins)), key=lambda b: (len(bins[b]) > 1, sum(lengths[i] for i in bins[b]), -b))
        if len(bins[heaviest]) < 2:
            break
        halves = karmarkar_karp([lengths[i] for i in bins[heaviest]], 2)
        bins[heaviest : heaviest + 1] = [[bins[heaviest][i] for i in half] for half in halves]
    return bins
