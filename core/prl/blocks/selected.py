"""Attention of queries each of which sees tokens of its own: forward and backward in chunks of queries.

For a chunk the keys and values that its queries see are fetched, [chunk, k, D], so memory grows with k and not with the
length of the sequence, and nothing of it is kept for the backward pass, which fetches them again. Gradients of keys are
added up in float32 and in a fixed order. Called by `prl.blocks.dsa`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_CHUNK = 2**27
"""Elements of the largest temporary tensor, where one query's do not exceed it: half a gigabyte in float32."""


def chunks(length: int, each: int) -> Iterator[slice]:
    """Slices of `length` rows that need `each` elements apiece."""
    rows = max(1, _CHUNK // max(1, each))
    return (slice(start, min(start + rows, length)) for start in range(0, length, rows))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_to_selected(q: Tensor, k: Tensor, v: Tensor, selected: Tensor, *, scale: float) -> Tensor:
    """q [S, L, H, D], k and v [S, K, G, D], selected [S, L, k] int32 with -1 for none -> [S, L, H, D].

    Every query sees a token. Where values are the keys (`v is k`) they are fetched once.
    """
    out: Tensor = _Selected.apply(q, k, None if v is k else v, selected, scale)  # type: ignore[no-untyped-call]
    return out


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor | None, selected: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v, selected)
        ctx.scale = scale
        out = torch.empty_like(q)
        for rows in _chunks(k, selected):
            places, seen = _places(selected[:, rows], k.shape[1])
            keys = _fetched(k, places)
            values = keys if v is None else _fetched(v, places)
            queries = _grouped(q[:, rows], k)
            weights = _weights(queries, keys, seen, scale)
            mixed = torch.einsum("ngrk,nkgd->ngrd", weights.to(values.dtype), values)
            out[:, rows] = mixed.reshape(out[:, rows].shape)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        q, k, v, selected = ctx.saved_tensors
        for_q = torch.empty_like(q)
        for_k = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
        for_v = None if v is None else torch.zeros_like(for_k)
        for rows in _chunks(k, selected):
            places, seen = _places(selected[:, rows], k.shape[1])
            keys = _fetched(k, places)
            values = keys if v is None else _fetched(v, places)
            queries, grads = _grouped(q[:, rows], k), _grouped(grad[:, rows], k)
            weights = _weights(queries, keys, seen, ctx.scale)  # [N, G, R, k] float32
            for_weights = torch.einsum("ngrd,nkgd->ngrk", grads, values).float()
            inner = (weights * for_weights).sum(-1, keepdim=True)
            for_scores = (weights * (for_weights - inner) * ctx.scale).to(keys.dtype)
            for_q[:, rows] = torch.einsum("ngrk,nkgd->ngrd", for_scores, keys).reshape(for_q[:, rows].shape)
            for_keys = torch.einsum("ngrk,ngrd->nkgd", for_scores, queries)
            for_values = torch.einsum("ngrk,ngrd->nkgd", weights.to(values.dtype), grads)
            if for_v is None:
                _add(for_k, places, for_keys + for_values)
            else:
                _add(for_k, places, for_keys)
                _add(for_v, places, for_values)
        return for_q, for_k.to(k.dtype), None if for_v is None else for_v.to(k.dtype), None, None


def _chunks(k: Tensor, selected: Tensor) -> Iterator[slice]:
    sequences, length, count = selected.shape
    return chunks(length, sequences * count * k.shape[2] * k.shape[3])


def _places(selected: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """selected [S, c, k] -> [S * c, k] int64 places among the keys of all sequences, and which of them are seen.

    Those that are not seen get any place, each another: sums of many equal places would be slow.
    """
    sequences, _, count = selected.shape
    seen = selected >= 0
    any_place = torch.arange(count, device=selected.device).expand_as(selected)
    places = selected.long().where(seen, any_place)
    places += torch.arange(0, sequences * keys, keys, device=selected.device)[:, None, None]
    return places.flatten(0, 1), seen.flatten(0, 1)


def _fetched(x: Tensor, places: Tensor) -> Tensor:
    """x [S, K, G, D] -> [N, k, G, D]"""
    return x.flatten(0, 1)[places]


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """x [S, c, H, D] -> [S * c, G, H / G, D]"""
    return torch.unflatten(x.flatten(0, 1), 1, (k.shape[2], -1))


def _weights(queries: Tensor, keys: Tensor, seen: Tensor, scale: float) -> Tensor:
    """queries [N, G, R, D], keys [N, k, G, D], seen [N, k] -> [N, G, R, k] float32, rows that add up to 1."""
    scores = torch.einsum("ngrd,nkgd->ngrk", queries, keys).float() * scale
    return scores.masked_fill_(~seen[:, None, None], float("-inf")).softmax(-1)


def _add(total: Tensor, places: Tensor, parts: Tensor) -> None:
    """parts [N, k, G, D] into total [S, K, G, D], in one order, which on a GPU is not `index_add_`'s."""
    rows, index = parts.flatten(0, 1).float(), places.flatten()
    if total.is_cuda:
        total.flatten(0, 1).index_put_((index,), rows, accumulate=True)
    else:
        total.flatten(0, 1).index_add_(0, index, rows)
