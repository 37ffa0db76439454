"""DeepSeek sparse attention (DeepSeek-AI 2025, DeepSeek-V3.2): a small indexer scores all earlier tokens, and attention
sees the best `top_k` of them.

The indexer is not trained in reinforcement learning: its weights are frozen and its choice carries no gradient.
Selection is deterministic and does not depend on packing: scores are float32, and of equal scores (ReLU makes exact
zeros) the earliest token wins, where `torch.topk` would let the layout decide. While a sequence has no more than
`top_k` tokens all of them are seen, so nothing is scored. Layers may share the choice of an earlier layer (IndexShare,
arXiv:2603.12201). Called by `prl.blocks.mla`.

Scores of all pairs of tokens never exist at one time: queries are scored and attend in chunks (`prl.blocks.selected`),
and what is kept of a choice is the places of the chosen tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from prl.blocks import padding
from prl.blocks.attend import layouts
from prl.blocks.cache import KeysAndValues, TokenCache
from prl.blocks.context import Context
from prl.blocks.kernels import seam
from prl.blocks.linear import Linear
from prl.blocks.padding import Padding
from prl.blocks.rope import RotaryEmbedding, Tables, rotate
from prl.blocks.selected import attend_to_selected, chunks

Selection: TypeAlias = "list[Tensor]"
"""For each rectangle of new tokens (`rectangles(context)`) a [S, L, min(top_k, K)] int32: the places of those of its
sequence's K tokens that a query sees, in order; -1 behind them where it sees fewer."""
IndexCache: TypeAlias = TokenCache
"""Index keys, one [head_dim] per token."""

_KEY_NORM_EPS = 1e-6
_MEMO = "token selection"


class Indexer(nn.Module):
    """Chooses tokens for the layer it belongs to. Never trained."""

    def __init__(
        self, *, hidden_size: int, q_rank: int, heads: int, head_dim: int, top_k: int, rope: RotaryEmbedding
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.top_k, self.rope = heads, head_dim, top_k, rope
        self.wq_b = Linear(q_rank, heads * head_dim)
        self.wk = Linear(hidden_size, head_dim)
        self.k_norm = nn.LayerNorm(head_dim, eps=_KEY_NORM_EPS)
        self.weights_proj = Linear(hidden_size, heads)
        self.requires_grad_(False)

    def initialise_own(self) -> None:
        """The bias of the key's norm starts at zero."""
        self.k_norm.bias.zero_()

    @torch.no_grad()
    def forward(
        self, x: Tensor, q_latent: Tensor, context: Context, layer_index: int, cache: IndexCache | None
    ) -> Selection | None:
        """x [T, hidden], q_latent [T, q_rank] normed -> what each token may see; None: every token before it.

        With a cache the keys of the new tokens are stored in it. A layer that is computed again has its choice still.
        """
        if cache is None and (_MEMO, layer_index) in context.memo:
            return cast("Selection | None", context.memo[_MEMO, layer_index])
        everything = context.longest <= self.top_k
        selection: Selection | None = None
        if cache is not None or not everything:
            tables = self.rope.tables(context, x.dtype)
            keys = self._rotated(self.k_norm(self.wk(x))[:, None], tables)
            if cache is not None:
                cache.store(keys, context)
            if not everything:
                selection = self._select(self._rotated(self._queries(q_latent), tables), keys, x, context, cache)
        context.memo[_MEMO, layer_index] = selection
        return selection

    def new_cache(self, rows: int, length: int) -> IndexCache | None:
        """None when sequences of `length` tokens are never selected from."""
        if length <= self.top_k:
            return None
        weight = self.wk.weight
        return TokenCache(
            rows=rows, length=length, heads=1, size=self.head_dim, dtype=weight.dtype, device=weight.device
        )

    def _queries(self, q_latent: Tensor) -> Tensor:
        queries: Tensor = self.wq_b(q_latent).unflatten(1, (self.heads, self.head_dim))
        return queries

    def _rotated(self, heads: Tensor, tables: Tables) -> Tensor:
        """heads [T, H, head_dim] with their first dimensions turned."""
        turned, rest = torch.split(heads, [self.rope.head_dim, self.head_dim - self.rope.head_dim], 2)
        return torch.cat((rotate(turned, tables), rest), 2)

    def _select(
        self, queries: Tensor, keys: Tensor, x: Tensor, context: Context, cache: IndexCache | None
    ) -> Selection:
        layout, seen = rectangles(context)
        weights = self.weights_proj(x).float() * self.heads**-0.5
        known: Iterable[Tensor] = seen.pad(context.with_earlier(keys))
        continues = cache is not None and context.past_max > 0
        if cache is not None and continues:
            known = [cache.stored_of(context).transpose(1, 2)]
        parts = zip(layout.pad(queries), known, layout.pad(weights), layout.pad(context.positions), strict=True)
        return [self._selected(*part, ends_with_keys=not continues) for part in parts]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _selected(
        self, queries: Tensor, keys: Tensor, weights: Tensor, positions: Tensor, *, ends_with_keys: bool
    ) -> Tensor:
        """queries [S, L, H, D], keys [S, K, 1, D], weights [S, L, H], positions [S, L] -> [S, L, min(top_k, K)] int32.

        `ends_with_keys`: the last query is of the last key's token, so earlier queries need not look at later keys.
        """
        sequences, length, known = *queries.shape[:2], keys.shape[1]
        selected = queries.new_full((sequences, length, min(self.top_k, known)), -1, dtype=torch.int32)
        for rows in chunks(length, sequences * known * self.heads):
            seen = known - length + rows.stop if ends_with_keys else known
            scores = index_scores(queries[:, rows], keys[:, :seen, 0], weights[:, rows])
            later = torch.arange(seen, device=scores.device) > positions[:, rows, None]
            best = select_topk(scores.masked_fill_(later, float("-inf")), self.top_k)
            # In the order of the sequence, whatever the scores: then sums over them do not depend on rounding.
            ordered = best.where(best >= 0, seen).sort(-1).values
            selected[:, rows, : ordered.shape[-1]] = ordered.where(ordered < seen, -1)
        return selected


class SharedIndex(nn.Module):
    """Stands where an indexer would: the layer sees what the last layer with an indexer chose.

    The context has it by layer: a layer that is computed again, last layers first, must find what it found before.
    """

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        """Of that indexer."""

    def forward(
        self, x: Tensor, q_latent: Tensor, context: Context, layer_index: int, cache: IndexCache | None
    ) -> Selection | None:
        """The choice, from the context."""
        selection: Selection | None = context.memo[_MEMO, layer_index - 1]
        context.memo[_MEMO, layer_index] = selection
        return selection

    def new_cache(self, rows: int, length: int) -> None:
        """It remembers nothing."""


# --- the kernels' reference -------------------------------------------------------------------------------------------
@seam
def index_scores(queries: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """queries [S, L, H, D], keys [S, K, D], weights [S, L, H] float32 -> [S, L, K] float32.

    score[l, k] = sum over h of weights[l, h] * relu(queries[l, h] . keys[k] / sqrt(D))
    """
    products = torch.einsum("slhd,skd->slhk", queries.float(), keys.float()).mul_(queries.shape[-1] ** -0.5)
    return torch.einsum("slh,slhk->slk", weights, products.relu_())


@seam
def select_topk(scores: Tensor, count: int) -> Tensor:
    """scores [..., K], -inf where a token cannot be seen -> the best [..., min(count, K)] int64.

    Of equal scores the smallest index comes first; -1 stands where there are no more tokens to see.
    """
    values, indices = scores.sort(dim=-1, descending=True, stable=True)
    return indices[..., :count].masked_fill_(values[..., :count] == float("-inf"), -1)


@seam
def sparse_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: Context,
    *,
    scale: float,
    selection: Selection,
    cache: KeysAndValues | None = None,
) -> Tensor:
    """`prl.blocks.attend.attend` over selected tokens only: [T, H, D]. Work and memory are those of the selected."""
    layout, seen = rectangles(context)
    keys: Iterable[Tensor] = list(seen.pad(k))
    values: Iterable[Tensor] = keys if v is k else seen.pad(v)
    if cache is not None:
        cache.write(k, v, context)
        if context.past_max > 0:
            keys, values = ([cached.transpose(1, 2)] for cached in cache.read(context))
    parts = zip(layout.pad(q), keys, values, selection, strict=True)
    return layout.unpad([attend_to_selected(*part, scale=scale) for part in parts])


def rectangles(context: Context) -> tuple[Padding, Padding]:
    """How selection and sparse attention lay out the new tokens, and the tokens they see where no cache holds them.

    The rectangle of a continuation has all sequences.
    """
    if context.past_max == 0:
        return layouts(context)
    if "sparse layout" not in context.memo:
        context.memo["sparse layout"] = padding.square(context.lengths, context.positions.device)
    layout: Padding = context.memo["sparse layout"]
    return layout, layout
