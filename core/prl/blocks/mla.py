"""Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1).

Keys and values of all heads are linear in one small latent per token; positions are told by a second, rotated part of
the key that heads share. Two ways to the same result:

    expanded   every head's keys and values are computed from the latents: cheapest when all tokens are new
    absorbed   queries are taken into the latent space and attend to the latents themselves: grouped-query attention
               with one key head of kv_rank + rope_dim, which is all a cache must hold, and all that must be fetched
               for a query that sees tokens of its own selection

Latents are also all that ranks which share a sequence must exchange.
"""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional

from prl.blocks.attend import attend, prepare
from prl.blocks.cache import SharedKeyCache
from prl.blocks.context import Context
from prl.blocks.dsa import IndexCache, Indexer, Selection, SharedIndex, rectangles, sparse_attend
from prl.blocks.linear import Linear
from prl.blocks.norm import RMSNorm
from prl.blocks.rope import RotaryEmbedding, Tables, rotate


@attrs.frozen(kw_only=True)
class LatentHeads:
    """Sizes of an MLA layer."""

    heads: int
    q_rank: int
    """Size of the queries' latent."""
    kv_rank: int
    """Size of the latent that keys and values are made of."""
    nope_dim: int
    """Part of a head's query and key that knows no position."""
    rope_dim: int
    """Part that is rotated."""
    value_dim: int

    @property
    def qk_dim(self) -> int:
        return self.nope_dim + self.rope_dim


@attrs.define
class LatentCache:
    """What an MLA layer remembers: [normed latent | rotated key] per token, and index keys where it selects tokens."""

    latents: SharedKeyCache
    index: IndexCache | None

    prefix_reusable = True

    def copy_row(self, source: int, target: int, length: int) -> None:
        """The first `length` tokens of one row into another."""
        self.latents.copy_row(source, target, length)
        if self.index is not None:
            self.index.copy_row(source, target, length)


class MultiHeadLatentAttention(nn.Module):
    """A mixer. `qkv_a_proj` holds the rows of q_a_proj, then those of kv_a_proj_with_mqa.

    With an `indexer` (or the selection of an earlier layer's) attention is sparse.
    """

    kind: ClassVar[str] = "attention"

    def __init__(
        self,
        sizes: LatentHeads,
        *,
        hidden_size: int,
        rope: RotaryEmbedding,
        norm_eps: float,
        indexer: Indexer | SharedIndex | None = None,
    ) -> None:
        super().__init__()
        self.sizes, self.rope = sizes, rope
        self.scale = sizes.qk_dim**-0.5 * (1.0 if rope.yarn is None else rope.yarn.softmax_factor)
        self.qkv_a_proj = Linear(hidden_size, sizes.q_rank + sizes.kv_rank + sizes.rope_dim)
        self.q_a_layernorm = RMSNorm(sizes.q_rank, norm_eps)
        self.q_b_proj = Linear(sizes.q_rank, sizes.heads * sizes.qk_dim)
        self.kv_a_layernorm = RMSNorm(sizes.kv_rank, norm_eps)
        self.kv_b_proj = Linear(sizes.kv_rank, sizes.heads * (sizes.nope_dim + sizes.value_dim))
        self.o_proj = Linear(sizes.heads * sizes.value_dim, hidden_size)
        self.indexer = indexer

    @property
    def shares_prefixes(self) -> bool:
        return self.indexer is None

    def forward(self, x: Tensor, context: Context, layer_index: int) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        sizes, tables = self.sizes, self.rope.tables(context, x.dtype)
        cache = None if context.caches is None else context.caches[layer_index]
        q_latent, latent, k_rope = self.qkv_a_proj(x).split((sizes.q_rank, sizes.kv_rank, sizes.rope_dim), 1)
        q_latent = self.q_a_layernorm(q_latent)
        latent = torch.cat((self.kv_a_layernorm(latent), rotate(k_rope[:, None], tables)[:, 0]), 1)
        q_nope, q_rope = self._queries(q_latent, tables)
        selection: Selection | None = None
        if self.indexer is not None:
            selection = self.indexer(x, q_latent, context, layer_index, cache and cache.index)
        if context.past_max == 0:
            if cache is not None:
                cache.latents.write(latent[:, None], latent[:, None], context)
            latent = context.with_earlier(latent)
        if context.past_max == 0 and selection is None:
            mixed = self.expanded(q_nope, q_rope, latent, context)
        else:
            continued = cache.latents if cache is not None and context.past_max > 0 else None
            mixed = self.absorbed(q_nope, q_rope, latent, context, selection=selection, cache=continued)
        projected: Tensor = self.o_proj(mixed.flatten(1))
        return projected

    def expanded(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, context: Context) -> Tensor:
        """q_nope [T, H, nope], q_rope [T, H, rope], latent [T, kv_rank + rope] -> [T, H, value_dim].

        Where ranks share sequences `latent` has the earlier tokens too.
        """
        sizes = self.sizes
        normed, k_rope = torch.split(latent, [sizes.kv_rank, sizes.rope_dim], 1)
        k_nope, v = self.kv_b_proj(normed).unflatten(1, (sizes.heads, -1)).split((sizes.nope_dim, sizes.value_dim), 2)
        q = torch.cat((q_nope, q_rope), 2)
        k = torch.cat((k_nope, k_rope[:, None].expand(-1, sizes.heads, -1)), 2)
        # Fused attention kernels want values of the keys' size.
        padded = functional.pad(v, (0, sizes.qk_dim - sizes.value_dim))
        return attend(q, k, padded, context, scale=self.scale)[..., : sizes.value_dim]

    def absorbed(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        context: Context,
        *,
        selection: Selection | None,
        cache: SharedKeyCache | None = None,
    ) -> Tensor:
        """The same as `expanded`; also for selected tokens, and for tokens that continue those in `cache`."""
        sizes = self.sizes
        per_head = torch.unflatten(self.kv_b_proj.as_served("weight"), 0, (sizes.heads, -1))
        to_key, to_value = per_head[:, : sizes.nope_dim], per_head[:, sizes.nope_dim :]  # [H, ..., kv_rank]
        q_latent = torch.bmm(q_nope.transpose(0, 1), to_key).transpose(0, 1)  # [T, H, kv_rank]
        q, k = torch.cat((q_latent, q_rope), 2), latent[:, None]
        mixed = _attend(q, k, k, context, scale=self.scale, selection=selection, cache=cache)[..., : sizes.kv_rank]
        return torch.bmm(mixed.transpose(0, 1), to_value.transpose(1, 2)).transpose(0, 1)

    def prepare(self, x: Tensor, context: Context) -> None:
        """Compute ahead what layers share (`prl.blocks.decoder.Preparing`)."""
        self.rope.tables(context, x.dtype)
        prepare(x, context)
        if self.indexer is not None:
            rectangles(context)

    def new_cache(self, rows: int, length: int) -> LatentCache:
        """For `rows` sequences of `length` tokens, where the weights are."""
        weight = self.kv_b_proj.weight
        size = self.sizes.kv_rank + self.sizes.rope_dim
        latents = SharedKeyCache(rows=rows, length=length, size=size, dtype=weight.dtype, device=weight.device)
        return LatentCache(latents, None if self.indexer is None else self.indexer.new_cache(rows, length))

    def _queries(self, q_latent: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
        """[T, H, nope], and rotated [T, H, rope]."""
        q = self.q_b_proj(q_latent).unflatten(1, (self.sizes.heads, -1))
        q_nope, q_rope = q.split((self.sizes.nope_dim, self.sizes.rope_dim), 2)
        return q_nope, rotate(q_rope, tables)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: Context,
    *,
    scale: float,
    selection: Selection | None,
    cache: SharedKeyCache | None = None,
) -> Tensor:
    if selection is None:
        return attend(q, k, v, context, scale=scale, cache=cache)
    return sparse_attend(q, k, v, context, scale=scale, selection=selection, cache=cache)
