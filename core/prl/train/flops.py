"""How many floating-point operations a model needs for packed tokens, by kind of work.

    forward     what the mathematics asks for: two per multiply-add of every product, each document attending to itself
    backward    twice that for what is trained; once for a frozen matrix, through which a gradient only passes
    recompute   what is computed again to save memory: scores by fused attention kernels, logits by the chunked head

Elementwise work is not counted. The attention of a document of n tokens is n (n + 1) / 2 pairs, not n^2; a token that
selects sees the k best, not all; a token costs the experts it is sent to, not all of them. What activation
checkpointing repeats is the caller's to add, a `forward` per layer (`Flops.checkpointed`).

A kind of module says what it costs in a function registered with `count`; any other module costs what its children do.
Called by trainer metrics and `prl plan`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import singledispatch
from typing import Literal, TypeAlias

import attrs
from torch import nn

from prl.blocks.attention import GroupedQueryAttention
from prl.blocks.dsa import Indexer, SharedIndex
from prl.blocks.mamba2 import CausalConvolution, Mamba2
from prl.blocks.mla import MultiHeadLatentAttention
from prl.blocks.moe import MixtureOfExperts
from prl.errors import UserError

Work: TypeAlias = Literal["dense", "experts", "attention", "index", "scan", "head"]
"""What kind of kernel does it: their speeds differ."""


@attrs.frozen
class Packed:
    """Documents one after the other, as one rank computes them.

    Example:
        >>> Packed((3, 2)).pairs, Packed((3, 2)).pairs_within(2)
        (9, 8)
    """

    lengths: Sequence[int]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def pairs(self) -> int:
        """Of a token and one it may attend to, itself included."""
        return sum(n * (n + 1) // 2 for n in self.lengths)

    def pairs_within(self, most: int) -> int:
        """The same where no token attends to more than `most`."""
        return sum(_seen(min(n, most)) + max(0, n - most) * most for n in self.lengths)


def _seen(length: int) -> int:
    return length * (length + 1) // 2


@attrs.frozen
class Flops:
    """Operations by kind of work."""

    forward: Mapping[Work, float] = attrs.field(factory=dict)
    backward: Mapping[Work, float] = attrs.field(factory=dict)
    recompute: Mapping[Work, float] = attrs.field(factory=dict)

    def __add__(self, other: Flops) -> Flops:
        sides = attrs.fields(Flops)
        return Flops(*(_sum(getattr(self, side.name), getattr(other, side.name)) for side in sides))

    def scaled(self, factor: float) -> Flops:
        """Times a number."""
        sides = (self.forward, self.backward, self.recompute)
        return Flops(*({work: factor * n for work, n in side.items()} for side in sides))

    def checkpointed(self) -> Flops:
        """The same under full activation checkpointing: the forward pass is computed again during the backward."""
        return attrs.evolve(self, recompute=_sum(self.recompute, self.forward))

    @property
    def model(self) -> float:
        """Forward and backward: the numerator of MFU, which recomputation does not raise."""
        return sum(self.forward.values()) + sum(self.backward.values())

    @property
    def executed(self) -> float:
        """With what is computed again."""
        return self.model + sum(self.recompute.values())


def _sum(left: Mapping[Work, float], right: Mapping[Work, float]) -> dict[Work, float]:
    return {work: left.get(work, 0) + right.get(work, 0) for work in (*left, *(w for w in right if w not in left))}


def total(parts: Iterable[Flops]) -> Flops:
    """Their sum."""
    return sum(parts, Flops())


def model_flops(model: nn.Module, packed: Packed, *, scored: int) -> Flops:
    """Of a `prl.providers.LanguageModel` for one forward and backward: all of it but `head()`, and that `scored` times.

    UserError for a module with a matrix and no registered count.
    """
    layers = total(count(layer, packed) for layer in model.get_submodule("layers").children())
    return layers + head_flops(model.head(), scored)  # type: ignore[operator]


def head_flops(head: nn.Parameter, scored: int) -> Flops:
    """Of the logits of `scored` tokens, which `prl.train.logprobs` computes a second time for the gradient."""
    product = 2 * scored * head.numel()
    return Flops({"head": product}, {"head": 2 * product}, {"head": product})


# --- kinds of modules -------------------------------------------------------------------------------------------------
@singledispatch
def count(module: nn.Module, packed: Packed) -> Flops:
    """Of one module for packed tokens. Register a function for a kind of module whose children are not all it does."""
    own = [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() > 1]
    if own:
        raise UserError(
            f"no FLOP count for {type(module).__name__} ({', '.join(own)}): register one with prl.train.flops.count"
        )
    return total(count(child, packed) for child in module.children())


def product(matrix: nn.Module, rows: int, size: int, work: Work = "dense") -> Flops:
    """`rows` times a matrix of `size` elements that belongs to `matrix`."""
    trained = any(parameter.requires_grad for parameter in matrix.parameters(recurse=False))
    forward = 2 * rows * size
    return Flops({work: forward}, {work: (2 if trained else 1) * forward})


@count.register
def _(module: nn.Linear, packed: Packed) -> Flops:
    return product(module, packed.tokens, module.in_features * module.out_features)


@count.register
def _(module: nn.Embedding, packed: Packed) -> Flops:
    return Flops()


def attention(pairs: int, heads: int, qk_dim: int, value_dim: int) -> Flops:
    """Softmax(q k^T) v: two products forward, four backward, and q k^T once more by every fused kernel."""
    scores, values = 2 * pairs * heads * qk_dim, 2 * pairs * heads * value_dim
    return Flops({"attention": scores + values}, {"attention": 2 * (scores + values)}, {"attention": scores})


def _children(module: nn.Module, packed: Packed, *, without: Sequence[str] = ()) -> Flops:
    return total(count(child, packed) for name, child in module.named_children() if name not in without)


@count.register
def _(module: GroupedQueryAttention, packed: Packed) -> Flops:
    return _children(module, packed) + attention(packed.pairs, module.heads, module.head_dim, module.head_dim)


@count.register
def _(module: MultiHeadLatentAttention, packed: Packed) -> Flops:
    """Keys and values of every head are computed from the latent (expanded), until tokens select what they see.

    What is selected differs from token to token, so the latents themselves are gathered and every head attends to
    them (absorbed); `kv_b_proj` then multiplies queries and outputs, as many operations as it takes to expand.
    """
    sizes, indexer = module.sizes, module.indexer
    projections = _children(module, packed)
    if indexer is None or packed.longest <= indexer.top_k:
        return projections + attention(packed.pairs, sizes.heads, sizes.qk_dim, sizes.value_dim)
    seen = packed.pairs_within(indexer.top_k)
    return projections + attention(seen, sizes.heads, sizes.kv_rank + sizes.rope_dim, sizes.kv_rank)


@count.register
def _(module: Indexer, packed: Packed) -> Flops:
    """Nothing while all earlier tokens are seen; never a backward pass."""
    if packed.longest <= module.top_k:
        return Flops()
    projections = sum(p.numel() for p in module.parameters() if p.dim() > 1)
    scores = packed.pairs * module.heads * (module.head_dim + 1)  # with the weighted sum over heads
    return Flops({"dense": 2 * packed.tokens * projections, "index": 2 * scores})


@count.register
def _(module: SharedIndex, packed: Packed) -> Flops:
    return Flops()


@count.register
def _(module: MixtureOfExperts, packed: Packed) -> Flops:
    """The router, the experts a token is sent to, and what every token goes through."""
    router, experts = module.gate, module.experts
    size = sum(parameter.numel() for parameter in experts.parameters()) // len(router.weight)
    rows = packed.tokens * router.experts_per_token
    chosen = product(experts, rows, size, "experts")
    return (
        product(router, packed.tokens, router.weight.numel())
        + chosen
        + _children(module, packed, without=("gate", "experts"))
    )


@count.register
def _(module: Mamba2, packed: Packed) -> Flops:
    """Projections, convolution, and the chunked scan: inside a chunk as attention of all pairs, across by the state."""
    sizes = module.sizes
    per_token = 4 * sizes.heads * sizes.head_dim * sizes.state
    in_chunk = 2 * (sizes.groups * sizes.state + sizes.heads * sizes.head_dim)
    scan = sum(n * (per_token + in_chunk * min(n, sizes.chunk)) for n in packed.lengths)
    return _children(module, packed) + Flops({"scan": scan}, {"scan": 2 * scan})


@count.register
def _(module: CausalConvolution, packed: Packed) -> Flops:
    return product(module, packed.tokens, module.weight.numel(), "scan")
