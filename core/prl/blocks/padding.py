"""Ragged packed sequences as rectangles and back, for attention kernels that only know rectangles.

Sequences of similar length share a rectangle, so that less than a third of the padded tokens is padding; when all
lengths are equal the rectangle is a view of the packed tokens. Padding comes last, so a causal kernel needs no mask: no
real token attends to it, and what padding attends to is thrown away.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import attrs
import torch
from torch import Tensor

from prl.blocks.context import SharedPrefixes

_MAX_STRETCH = 1.5
"""A sequence is padded to at most this many times its length."""


@attrs.frozen
class Padding:
    """Where each of `T` packed tokens lies in the rectangles, laid out one after the other (`P` tokens in all)."""

    shapes: tuple[tuple[int, int], ...]
    """(sequences, length) of each rectangle; P is the sum of their areas."""
    source: Tensor | None
    """[P] packed token (or the row that computes it) at each place, any at padding; None when the packed tokens are one
    rectangle already."""
    places: Tensor | None
    """[T] place of each packed token (or [U], one place of each row)."""

    def pad(self, x: Tensor) -> Iterator[Tensor]:
        """x [T, ...] -> one [sequences, length, ...] for each rectangle."""
        padded = x if self.source is None else x.index_select(0, self.source)
        areas = [count * length for count, length in self.shapes]
        parts = torch.split(padded, areas) if len(areas) > 1 else (padded,)
        for part, shape in zip(parts, self.shapes, strict=True):
            yield torch.unflatten(part, 0, shape)

    def unpad(self, rectangles: Sequence[Tensor]) -> Tensor:
        """One [sequences, length, ...] for each rectangle -> [T, ...]."""
        parts = [part.flatten(0, 1) for part in rectangles]
        padded = torch.cat(parts) if len(parts) > 1 else parts[0]
        return padded if self.places is None else padded.index_select(0, self.places)

    def through(self, shared: SharedPrefixes) -> Padding:
        """For `U` rows that compute the `T` packed tokens: a row goes to every place of its tokens."""
        return Padding(
            self.shapes,
            shared.source if self.source is None else shared.source.index_select(0, self.source),
            shared.kept if self.places is None else shared.collect(self.places),
        )


def bucketed(lengths: Sequence[int], device: torch.device) -> Padding:
    """Rectangles of sequences of similar length."""
    return _arranged(lengths, _buckets(lengths, range(len(lengths))), device)


def continued(lengths: Sequence[int], earlier: int, device: torch.device) -> tuple[Padding, Padding]:
    """Rectangles of sequences of which the first goes on from `earlier` tokens elsewhere, and the last may go on
    elsewhere: (new tokens, the same with the earlier ones before them). Both sequences have rectangles of their own,
    those of the first and then of the last come first."""
    apart = sorted({0, len(lengths) - 1})
    buckets = [[s] for s in apart] + _buckets(lengths, range(1, len(lengths) - 1))
    with_earlier = [lengths[0] + earlier, *lengths[1:]]
    return _arranged(lengths, buckets, device), _arranged(with_earlier, buckets, device)


def _buckets(lengths: Sequence[int], chosen: Iterable[int]) -> list[list[int]]:
    """Longest first; sequences without tokens are in none."""
    occupied = sorted((s for s in chosen if lengths[s]), key=lambda s: -lengths[s])
    buckets: list[list[int]] = []
    for s in occupied:
        if not buckets or lengths[buckets[-1][0]] > _MAX_STRETCH * lengths[s]:
            buckets.append([])
        buckets[-1].append(s)
    return buckets


def square(lengths: Sequence[int], device: torch.device) -> Padding:
    """One rectangle with all sequences in their order, however much padding that takes."""
    return _arranged(lengths, [list(range(len(lengths)))], device)


def _arranged(lengths: Sequence[int], buckets: Sequence[Sequence[int]], device: torch.device) -> Padding:
    shapes = tuple((len(bucket), max(lengths[s] for s in bucket)) for bucket in buckets)
    in_order = [s for bucket in buckets for s in bucket] == [s for s, n in enumerate(lengths) if n]
    if in_order and all(
        lengths[s] == longest for bucket, (_, longest) in zip(buckets, shapes, strict=True) for s in bucket
    ):
        return Padding(shapes, None, None)
    first_token = [0]
    for n in lengths:
        first_token.append(first_token[-1] + n)
    places = torch.empty(first_token[-1], dtype=torch.int64)
    area = 0
    for bucket, (_, longest) in zip(buckets, shapes, strict=True):
        for s in bucket:
            places[first_token[s] : first_token[s + 1]] = torch.arange(area, area + lengths[s])
            area += longest
    source = torch.zeros(area, dtype=torch.int64)
    source[places] = torch.arange(len(places))
    return Padding(shapes, source.to(device), places.to(device))
