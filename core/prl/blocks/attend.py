"""The attention core: softmax(q k^T) v, causal inside each sequence, over packed tokens or a cache.

`attend` is the one seam between the blocks and attention kernels: callers bring q, k, v of the new tokens, the context
says which of them see each other, and the kernel is chosen here from the case at hand:

    training, or first tokens of every sequence   rectangles and a causal kernel (CPU), variable-length flash (GPU)
    one new token per sequence                    the cache by view, no copy
    several new tokens after cached ones          a rectangle of queries with a mask
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from prl.blocks import invariance, padding
from prl.blocks.cache import KeysAndValues
from prl.blocks.context import Context
from prl.blocks.padding import Padding

_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
"""torch 2.11 takes grouped keys without being told."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, context: Context, *, scale: float, cache: KeysAndValues | None = None
) -> Tensor:
    """Attention of the new tokens over their own sequences: [T, H, D].

    q [T, H, D], k and v [T, G, D] with G a divisor of H (grouped queries), `scale` multiplies q k^T. With a cache the
    new k and v are stored in it first, and earlier tokens are read from it.
    """
    if cache is not None:
        cache.write(k, v, context)
    if not len(q):
        return q
    if cache is None or context.past_max == 0:
        return _from_the_start(q, k, v, context, scale)
    if context.decoding:
        return _one_token(q, cache, context, scale)
    return _continued(q, cache, context, scale)


def _from_the_start(q: Tensor, k: Tensor, v: Tensor, context: Context, scale: float) -> Tensor:
    """All sequences begin with these tokens: block-diagonal causal attention."""
    if _flash_takes(q):
        return _variable_length(q, k, v, context, scale)
    layout = _layout(context)
    rectangles = [
        _sdpa(*parts, scale=scale, causal=True)
        for parts in zip(layout.pad(q), layout.pad(k), layout.pad(v), strict=True)
    ]
    return layout.unpad(rectangles)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """q, k, v [S, L, heads, D] -> [S, L, H, D]. Kernels read grouped keys in place; expanding them costs a CPU 20%."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def _flash_takes(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)


def _variable_length(q: Tensor, k: Tensor, v: Tensor, context: Context, scale: float) -> Tensor:
    """torch's flash attention over packed sequences (Dao 2023, arXiv:2307.08691)."""
    if "bounds" not in context.memo:
        lengths = torch.tensor((0, *context.lengths), dtype=torch.int32)
        context.memo["bounds"] = lengths.cumsum(0, dtype=torch.int32).to(q.device)
    bounds, longest = context.memo["bounds"], context.longest
    if context.shared is not None:
        q, k, v = (context.shared.expand(x) for x in (q, k, v))
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0), **_GROUPED)
    assert isinstance(out, Tensor), "a tuple comes only with auxiliary outputs"
    return out if context.shared is None else context.shared.collect(out)


def _one_token(q: Tensor, cache: KeysAndValues, context: Context, scale: float) -> Tensor:
    """The queries of a group attend to the same keys, so they take the place of a kernel's query positions."""
    k, v = cache.read(context)  # [S, G, context.longest, D]
    grouped = torch.unflatten(q, 1, (k.shape[1], -1))  # [S, G, H / G, D]
    whole = context.past_min + 1 == context.longest
    mask = None if whole else _visible(context, context.positions[:, None], q.dtype)
    if q.is_cuda or q.dtype is not torch.float32:
        return functional.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale).flatten(1, 2)
    queries = invariance.whole_tile(grouped) if invariance.wanted() else grouped
    return _batched_products(queries, k, v, mask, scale)[:, :, : grouped.shape[2]].flatten(1, 2)


def _batched_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """q [S, G, Q, D], k and v [S, G, L, D] -> [S, G, Q, D]; for few queries 20% faster than a CPU's flash kernel."""
    bias = q.new_zeros(1, 1, 1) if mask is None else mask.expand(-1, q.shape[1], -1, -1).flatten(0, 1)
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view_as(q)


def _continued(q: Tensor, cache: KeysAndValues, context: Context, scale: float) -> Tensor:
    """Several new tokens after cached ones: a later turn, or the rest of a shared prompt."""
    if "square" not in context.memo:
        layout = padding.square(context.lengths, q.device)
        assert context.past is not None, "a context with caches has past"
        context.memo["square"] = layout, context.past[:, None] + torch.arange(layout.shapes[0][1], device=q.device)
    layout, positions = context.memo["square"]
    (queries,) = layout.pad(q)  # [S, L, H, D]
    k, v = (cached.transpose(1, 2) for cached in cache.read(context))
    rectangle = _sdpa(queries, k, v, scale=scale, mask=_visible(context, positions, q.dtype))
    unpadded: Tensor = layout.unpad([rectangle])
    return unpadded


def _visible(context: Context, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """positions [S, L] of queries -> [S, 1, L, context.longest], 0 where a key is at or before its query, else -inf."""
    key = ("mask", dtype)
    if key not in context.memo:
        keys = torch.arange(context.longest, device=positions.device)
        mask = torch.zeros(*positions.shape, context.longest, dtype=dtype, device=positions.device)
        context.memo[key] = mask.masked_fill_(keys > positions[..., None], float("-inf"))[:, None]
    visible: Tensor = context.memo[key]
    return visible


def _layout(context: Context) -> Padding:
    if "layout" not in context.memo:
        packed = padding.bucketed(context.lengths, context.positions.device)
        context.memo["layout"] = packed if context.shared is None else packed.through(context.shared)
    layout: Padding = context.memo["layout"]
    return layout
