"""Attention of packed documents on GPUs by torch's flash kernels (Dao 2023, arXiv:2307.08691)."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from prl.blocks.context import Context
from prl.blocks.rectangle import sdpa

_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
"""torch 2.11 takes grouped keys without being told."""

_LONG = 3072
"""Tokens of a document from which torch's fixed-length attention outruns its variable-length kernel on a Hopper GPU
(benchmarks/train_gpu.py --only attention: level at 2,048, 1.3 times as fast at 4,096, 1.75 times at 16,384)."""


def attend(q: Tensor, k: Tensor, v: Tensor, context: Context, *, scale: float) -> Tensor:
    """q [T, H, D], k and v [context.earlier + T, G, D] -> [T, H, D], causal inside each document."""
    return (_by_document if _are_long(context) else _variable_length)(q, k, v, context, scale)


def prepare(context: Context) -> None:
    """Compute ahead what `attend` finds in the context, so that a compiled layer only reads there."""
    if not _are_long(context):
        _ = context.bounds


def _are_long(context: Context) -> bool:
    """Long enough, on average, for one call per document."""
    if "long" not in context.memo:
        context.memo["long"] = context.earlier == 0 and sum(context.lengths) >= _LONG * len(context.lengths)
    long: bool = context.memo["long"]
    return long


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _by_document(q: Tensor, k: Tensor, v: Tensor, context: Context, scale: float) -> Tensor:
    """One fixed-length kernel per document; how many there are is nothing to compile for."""
    lengths = list(context.lengths)
    if context.shared is not None:
        q, k, v = (context.shared.expand(x) for x in (q, k, v))
    parts = zip(*(torch.split(x, lengths) for x in (q, k, v)), strict=True)
    outputs = [sdpa(*(part[None] for part in document), scale=scale, causal=True)[0] for document in parts]
    out = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return out if context.shared is None else context.shared.collect(out)


def _variable_length(q: Tensor, k: Tensor, v: Tensor, context: Context, scale: float) -> Tensor:
    """Of fewer queries than keys the last see all keys, which is what a sequence from an earlier rank needs."""
    bounds, seen = context.bounds
    longest = context.longest
    if context.shared is not None:
        q, k, v = (context.shared.expand(x) for x in (q, k, v))
    out = varlen_attn(q, k, v, bounds, seen, longest, longest, scale=scale, window_size=(-1, 0), **_GROUPED)
    assert isinstance(out, Tensor), "a tuple comes only with auxiliary outputs"
    return out if context.shared is None else context.shared.collect(out)
