"""The rows a model computes for a micro-batch: its tokens, where what samples have in common is there once.

The siblings of a group answer the same prompt, so a prompt that lies in one micro-batch several times is computed once,
forward and backward; only attention sees it in every sample (as verl's prefix grouper and AReaL's tree training do).
Gradients are the same sums in another order. Knows nothing of models; called by `prl.train.step`.
"""

from __future__ import annotations

from itertools import pairwise

import attrs
import numpy as np
from numpy.typing import NDArray

from prl.score.pack import round_up
from prl.train.streams import is_scored
from prl.types import ContextShard, Int32, MicroBatch

_LEAST_SHARE = 1 / 32
"""Of all tokens; for less, expanding rows costs more than computing them."""


@attrs.frozen(kw_only=True)
class Rows:
    """`U` rows for the `T` tokens of `S` samples."""

    tokens: Int32  # [U]
    cu_seqlens: Int32  # [S + 1], counts the T tokens
    source: NDArray[np.int64] | None = None  # [T] row that computes each token; None: row t computes token t
    kept: NDArray[np.int64] | None = None  # [U] a token that each row computes


def rows_of(micro: MicroBatch, *, share: bool) -> Rows:
    """The rows of `micro`; `share`: its samples' common prefixes once, unless ranks share the samples."""
    if micro.shard is not None:
        return _of_shard(micro, micro.shard)
    rows = _shared(micro) if share else None
    return _round_up(rows or Rows(tokens=micro.tokens, cu_seqlens=micro.cu_seqlens))


def _shared(micro: MicroBatch) -> Rows | None:
    """None when too little is shared.

    A sample shares the tokens before the first one that is trained with the last sample before it that shares nothing.
    """
    bounds, tokens = micro.cu_seqlens.tolist(), micro.tokens
    scored = is_scored(micro)
    new = np.ones(len(tokens), dtype=np.bool_)
    shares: list[tuple[int, int, int]] = []
    leader, leader_prompt = 0, 0
    for start, end in pairwise(bounds):
        prompt = int(np.argmax(scored[start:end])) if scored[start:end].any() else end - start
        most = min(prompt, leader_prompt)
        differ = np.flatnonzero(tokens[start : start + most] != tokens[leader : leader + most])
        common = int(differ[0]) if len(differ) else most
        if 2 * common <= prompt:
            leader, leader_prompt = start, prompt
            continue
        new[start : start + common] = False
        shares.append((start, leader, common))
    if new.sum() > (1 - _LEAST_SHARE) * len(tokens):
        return None
    source = np.cumsum(new) - 1
    for start, origin, common in shares:
        source[start : start + common] = source[origin : origin + common]
    kept = np.flatnonzero(new)
    return Rows(tokens=tokens[kept], cu_seqlens=micro.cu_seqlens, source=source, kept=kept)


def _of_shard(micro: MicroBatch, shard: ContextShard) -> Rows:
    """The tokens this rank computes, and the cu_seqlens of all ranks', padding included."""
    tokens, total = micro.tokens[: shard.rows], shard.rows * shard.count
    return Rows(
        tokens=np.pad(tokens, (0, shard.rows - len(tokens))),
        cu_seqlens=np.unique(np.append(micro.cu_seqlens, np.int32(total))),
    )


def _round_up(rows: Rows) -> Rows:
    """With a document of padding at the end, so that few distinct numbers of rows occur.

    Samples of equal length repeat their shape as they are.
    """
    count = len(rows.tokens)
    padding = round_up(count) - count
    if padding == 0 or len(set(np.diff(rows.cu_seqlens).tolist())) == 1:
        return rows
    total, more = int(rows.cu_seqlens[-1]), np.arange(padding)
    return Rows(
        tokens=np.pad(rows.tokens, (0, padding)),
        cu_seqlens=np.append(rows.cu_seqlens, np.int32(total + padding)),
        source=None if rows.source is None else np.append(rows.source, count + more),
        kept=None if rows.kept is None else np.append(rows.kept, total + more),
    )
