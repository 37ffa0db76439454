"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245), query-key norm and rotary positions optional.

Ranks that share sequences have two ways: to gather the keys and values of earlier tokens, or to exchange tokens for
heads, so that each attends with some of the heads to all tokens (DeepSpeed-Ulysses, Jacobs et al. 2023,
arXiv:2309.14509). The first moves less where queries share keys; the second gives every rank the same work.
"""

from __future__ import annotations

from math import lcm
from typing import ClassVar

import torch
from torch import Tensor, nn

from prl.blocks.attend import attend, prepare
from prl.blocks.cache import KeyValueCache
from prl.blocks.context import Context, SequenceShard
from prl.blocks.linear import Linear
from prl.blocks.norm import RMSNorm, rms_norm
from prl.blocks.rope import RotaryEmbedding, rotate


class GroupedQueryAttention(nn.Module):
    """A mixer. `qkv_proj` holds the rows of q (all heads), k and v, in this order."""

    kind: ClassVar[str] = "attention"
    shares_prefixes = True

    def __init__(
        self,
        *,
        hidden_size: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rope: RotaryEmbedding | None = None,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.rope = rope
        self.qkv_proj = Linear(hidden_size, (heads + 2 * kv_heads) * head_dim)
        self.o_proj = Linear(heads * head_dim, hidden_size)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)

    def forward(self, x: Tensor, context: Context, layer_index: int) -> Tensor:
        """x [T, hidden] -> [T, hidden]. Queries and keys are normed and rotated together: one chain of operations."""
        heads = self.qkv_proj(x).unflatten(1, (-1, self.head_dim))  # [T, heads + 2 kv_heads, head_dim]
        qk, v = heads.split((self.heads + self.kv_heads, self.kv_heads), 1)
        if self.q_norm is not None and self.k_norm is not None:
            qk = rms_norm(qk, self._qk_weight(self.q_norm.weight, self.k_norm.weight), self.q_norm.eps)
        if self.rope is not None:
            qk = rotate(qk, self.rope.tables(context, qk.dtype))
        q, k = qk.split((self.heads, self.kv_heads), 1)
        if context.shard is not None:
            mixed = self._with_others(q, k, v, context, context.shard)
        else:
            cache = None if context.caches is None else context.caches[layer_index]
            mixed = attend(q, k, v, context, scale=self.head_dim**-0.5, cache=cache)
        projected: Tensor = self.o_proj(mixed.flatten(1))
        return projected

    def _with_others(self, q: Tensor, k: Tensor, v: Tensor, context: Context, shard: SequenceShard) -> Tensor:
        """Of a rank that shares its sequences: q [T, H, D], k and v [T, G, D] -> [T, H, D]."""
        if not self._divides_heads(shard):
            k, v = torch.split(context.with_earlier(torch.cat((k, v), 2)), self.head_dim, 2)
            return attend(q, k, v, context, scale=self.head_dim**-0.5)
        assert context.whole is not None, "a context with a shard has the whole"
        # Each rank needs the keys of its queries: where there are fewer than ranks, several get the same.
        copies = lcm(self.kv_heads, shard.count) // self.kv_heads
        heads = (q, k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1))
        parts = [torch.unflatten(x, 1, (shard.count, -1)) for x in heads]  # [T, ranks, heads of one, D]
        of_all = shard.by_heads(torch.cat(parts, 2).flatten(1, 2))
        q, k, v = torch.split(of_all, [part.shape[2] for part in parts], 1)
        return shard.by_tokens(attend(q, k, v, context.whole, scale=self.head_dim**-0.5))

    def _divides_heads(self, shard: SequenceShard) -> bool:
        return shard.divides_heads and self.heads % shard.count == 0

    def prepare(self, x: Tensor, context: Context) -> None:
        """Compute ahead what layers share (`prl.blocks.decoder.Preparing`)."""
        if self.rope is not None:
            self.rope.tables(context, x.dtype)
        if context.shard is not None and context.whole is not None and self._divides_heads(context.shard):
            prepare(x, context.whole)
        else:
            prepare(x, context)

    def new_cache(self, rows: int, length: int) -> KeyValueCache:
        """For `rows` sequences of `length` tokens, where the weights are."""
        weight = self.qkv_proj.weight
        return KeyValueCache(
            rows=rows,
            length=length,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=weight.dtype,
            device=weight.device,
        )

    def _qk_weight(self, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        """[heads + kv_heads, head_dim]"""
        return torch.cat((q_weight.expand(self.heads, -1), k_weight.expand(self.kv_heads, -1)))
