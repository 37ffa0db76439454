"""The attention core: softmax(q k^T) v, causal inside each sequence, over packed tokens or a cache.

`attend` is the one seam between the blocks and attention kernels: callers bring q, k, v of the new tokens, the context
says which of them see each other, and the kernel is chosen here from the case at hand:

    training, or first tokens of every sequence   rectangles and a causal kernel (CPU), variable-length flash (GPU);
                                                  the same where the first sequence goes on from an earlier rank
    one new token per sequence                    the cache by view, no copy
    several new tokens after cached ones          a rectangle of queries with a mask
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from prl.blocks import invariance, padding
from prl.blocks.cache import KeysAndValues
from prl.blocks.context import Context
from prl.blocks.kernels import seam
from prl.blocks.padding import Padding
from prl.blocks.rectangle import sdpa


@seam
def attend(
    q: Tensor, k: Tensor, v: Tensor, context: Context, *, scale: float, cache: KeysAndValues | None = None
) -> Tensor:
    """Attention of the new tokens over their own sequences: [T, H, D].

    q [T, H, D], k and v [T, G, D] with G a divisor of H (grouped queries), `scale` multiplies q k^T. With a cache the
    new k and v are stored in it first, and earlier tokens are read from it. Where ranks share sequences k and v are
    [context.earlier + T, G, D], as `Context.with_earlier` gives them.
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
    """All keys and values are there: block-diagonal causal attention."""
    if _flash_takes(q):
        from prl.blocks import flash  # it brings torch's compiler along: half a second of the start of a CPU's engine

        return flash.attend(q, k, v, context, scale=scale)
    queries, keys = layouts(context)
    parts = zip(queries.pad(q), keys.pad(k), keys.pad(v), strict=True)
    return queries.unpad([_causal(*part, scale=scale) for part in parts])


def prepare(q_like: Tensor, context: Context) -> None:
    """Compute ahead what `attend` finds in the context, so that a compiled layer only reads there."""
    if _flash_takes(q_like):
        from prl.blocks import flash

        flash.prepare(context)
    else:
        layouts(context)


def _causal(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """q [S, L, H, D], k and v [S, K, G, D]: the queries are the last L of K tokens."""
    length, seen = q.shape[1], k.shape[1]
    if length == seen:
        return sdpa(q, k, v, scale=scale, causal=True)
    mask = torch.ones(length, seen, dtype=torch.bool, device=q.device).tril(seen - length)
    return sdpa(q, k, v, scale=scale, mask=mask)


def _flash_takes(q: Tensor) -> bool:
    """Also of tensors without data, which stand for a GPU's (`prl.train.trace`)."""
    return q.device.type in ("cuda", "meta") and q.dtype in (torch.bfloat16, torch.float16)


def _one_token(q: Tensor, cache: KeysAndValues, context: Context, scale: float) -> Tensor:
    """The queries of a group attend to the same keys, so they take the place of a kernel's query positions."""
    k, v = cache.read(context)  # [S, G, context.longest, D]
    grouped = torch.unflatten(q, 1, (k.shape[1], -1))  # [S, G, H / G, D]
    whole = context.past_min + 1 == context.longest
    mask = None if whole else _visible(context, context.positions[:, None], q.dtype)
    if q.is_cuda or q.dtype is not torch.float32:
        return functional.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale).flatten(1, 2)
    queries = invariance.enough_rows(grouped) if invariance.wanted() else grouped
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
    rectangle = sdpa(queries, k, v, scale=scale, mask=_visible(context, positions, q.dtype))
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


def layouts(context: Context) -> tuple[Padding, Padding]:
    """Rectangles of the new tokens, and of the tokens they see."""
    if "layouts" not in context.memo:
        context.memo["layouts"] = _arranged(context)
    arranged: tuple[Padding, Padding] = context.memo["layouts"]
    return arranged


def _arranged(context: Context) -> tuple[Padding, Padding]:
    device = context.positions.device
    if context.shard is not None:
        return padding.continued(context.lengths, context.earlier, device)
    packed = padding.bucketed(context.lengths, device)
    return (packed if context.shared is None else packed.through(context.shared),) * 2
