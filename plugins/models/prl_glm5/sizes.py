"""What a GLM-5 is made of, as published or as a toy. Imports no torch."""

from __future__ import annotations

import attrs
from prl.compose.routing import Routing
from prl.errors import UserError
from prl.providers import Limit

from prl_glm5 import Glm52Config, GlmConfig, published


@attrs.frozen(kw_only=True)
class Sizes:
    """Every number of the architecture."""

    vocab_size: int
    """0 in a toy: as many as the tokenizer has."""
    hidden_size: int
    layers: int
    dense_layers: int
    """Layers at the start that have no experts."""
    intermediate_size: int
    heads: int
    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    experts: int
    experts_per_token: int
    shared_experts: int
    expert_intermediate_size: int
    routed_scale: float = 2.5
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    positions: int = 202_752
    index_heads: int
    index_head_dim: int
    index_top_k: int
    index_period: int = 1
    """From layer `index_first_period - 1` on, every so many layers have an indexer; the others share its choice."""
    index_first_period: int = 2
    prediction_layers: int
    """Blocks that predict further tokens, which checkpoints keep after the last layer."""
    deviation: float = 0.02
    """Of fresh weights."""

    def has_indexer(self, layer: int) -> bool:
        """Whether a layer chooses for itself."""
        return max(layer - self.index_first_period + 1, 0) % self.index_period == 0


FULL = Sizes(
    vocab_size=154_880,
    hidden_size=6144,
    layers=78,
    dense_layers=3,
    intermediate_size=12_288,
    heads=64,
    q_rank=2048,
    kv_rank=512,
    nope_dim=192,
    rope_dim=64,
    value_dim=256,
    experts=256,
    experts_per_token=8,
    shared_experts=1,
    expert_intermediate_size=2048,
    index_heads=32,
    index_head_dim=128,
    index_top_k=2048,
    prediction_layers=1,
)
"""GLM-5 and GLM-5.1."""

TOY = Sizes(
    vocab_size=0,
    hidden_size=128,
    layers=4,
    dense_layers=1,
    intermediate_size=256,
    heads=4,
    q_rank=64,
    kv_rank=32,
    nope_dim=16,
    rope_dim=32,
    value_dim=48,
    experts=8,
    experts_per_token=2,
    shared_experts=1,
    expert_intermediate_size=40,
    index_heads=16,
    index_head_dim=40,
    index_top_k=128,
    prediction_layers=0,
    deviation=0.06,
)


_OVERRIDES = (
    "layers",
    "hidden_size",
    "experts",
    "experts_per_token",
    "expert_intermediate_size",
    "kv_rank",
    "rope_dim",
    "index_top_k",
)


def _read(folder: str) -> Sizes:
    fields, check = published.read(folder)
    sizes = Sizes(**fields)
    check(sizes)
    return sizes


def _named(config: GlmConfig) -> Sizes:
    sizes = TOY if config.size == "toy" else FULL
    if isinstance(config, Glm52Config):
        return attrs.evolve(sizes, index_period=4, index_first_period=3, rope_theta=8e6, positions=1_048_576)
    return sizes


def resolve(config: GlmConfig, vocab_size: int) -> Sizes:
    """The sizes a config asks for, with a vocabulary of at least the tokenizer's `vocab_size`."""
    sizes = _read(config.checkpoint) if config.checkpoint else _named(config)
    if sizes.vocab_size and sizes.vocab_size < vocab_size:
        named = f"model.checkpoint {config.checkpoint!r}" if config.checkpoint else f'model.size "{config.size}"'
        raise UserError(
            f"{named} has {sizes.vocab_size} tokens, but the tokenizer has {vocab_size}: use the tokenizer of the "
            "published model"
        )
    given = {name: value for name in _OVERRIDES if (value := getattr(config, name)) is not None}
    sizes = attrs.evolve(sizes, vocab_size=sizes.vocab_size or vocab_size, **given)
    if sizes.experts_per_token > sizes.experts:
        raise UserError(f"model.experts_per_token must be <= {sizes.experts} experts: {sizes.experts_per_token}")
    return sizes


def routing(config: GlmConfig) -> Routing:
    """Every layer but the dense ones at the start."""
    sizes = resolve(config, 0)
    return Routing(
        layers=tuple(f"layers.{index}" for index in range(sizes.dense_layers, sizes.layers)),
        experts=sizes.experts,
        experts_per_token=sizes.experts_per_token,
    )


def limits(config: GlmConfig, vocab_size: int) -> list[Limit]:
    """Over how many ranks it can be spread."""
    sizes = resolve(config, vocab_size)
    return [
        Limit(degree="expert", of="experts", count=sizes.experts),
        Limit(degree="tensor", of="attention heads", count=sizes.heads),
        Limit(degree="tensor", of="heads of the indexer", count=sizes.index_heads),
    ]
