"""The sizes of a GLM-5, as published or as a toy, and what they allow. Imports no torch."""

from __future__ import annotations

import attrs
from prl.compose.routing import Routing
from prl.families import deepseek_v3, moe
from prl.providers import Limit

from prl_glm5 import Glm52Config, GlmConfig, published
from prl_glm5.published import Sizes

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


def _named(config: GlmConfig) -> Sizes:
    sizes = TOY if config.size == "toy" else FULL
    if isinstance(config, Glm52Config):
        return attrs.evolve(sizes, index_period=4, index_first_period=3, rope_theta=8e6, positions=1_048_576)
    return sizes


def resolve(config: GlmConfig, vocab_size: int) -> Sizes:
    """The sizes a config asks for, with a vocabulary of at least the tokenizer's `vocab_size`."""
    sizes = published.read(config.checkpoint) if config.checkpoint else _named(config)
    return moe.resolve(config, sizes, vocab_size)


def routing(config: GlmConfig) -> Routing:
    """Every layer but the dense ones at the start."""
    return deepseek_v3.routing(resolve(config, 0))


def limits(config: GlmConfig, vocab_size: int) -> list[Limit]:
    """Over how many ranks it can be spread."""
    sizes = resolve(config, vocab_size)
    return [*deepseek_v3.limits(sizes), Limit(degree="tensor", of="heads of the indexer", count=sizes.index_heads)]
