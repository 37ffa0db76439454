"""The sizes of a Kimi-K2, as published or as a toy, and what they allow. Imports no torch."""

from __future__ import annotations

import attrs
from prl.compose.routing import Routing
from prl.families import deepseek_v3, moe
from prl.providers import Limit

from prl_kimi_k2 import KimiConfig, KimiK2Config, published
from prl_kimi_k2.published import Sizes

FULL = Sizes(
    vocab_size=163_840,
    hidden_size=7168,
    layers=61,
    dense_layers=1,
    intermediate_size=18_432,
    heads=64,
    q_rank=1536,
    kv_rank=512,
    nope_dim=128,
    rope_dim=64,
    value_dim=128,
    experts=384,
    experts_per_token=8,
    shared_experts=1,
    expert_intermediate_size=2048,
    yarn_original_length=4096,
)
"""Kimi-K2.5 and K2.7."""

FULL_K2 = attrs.evolve(FULL, rms_norm_eps=1e-6, yarn_beta_fast=1.0)
"""Kimi-K2 as of September 2025 (K2-Instruct-0905)."""

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
    value_dim=32,
    experts=8,
    experts_per_token=2,
    shared_experts=1,
    expert_intermediate_size=64,
    yarn_original_length=256,
    deviation=0.06,
)


def _named(config: KimiConfig) -> Sizes:
    if config.size == "toy":
        return TOY
    return FULL_K2 if isinstance(config, KimiK2Config) else FULL


def resolve(config: KimiConfig, vocab_size: int) -> Sizes:
    """The sizes a config asks for, with a vocabulary of at least the tokenizer's `vocab_size`."""
    vision = not isinstance(config, KimiK2Config)
    sizes = published.read(config.checkpoint, vision=vision) if config.checkpoint else _named(config)
    return moe.resolve(config, sizes, vocab_size)


def routing(config: KimiConfig) -> Routing:
    """Every layer but the dense ones at the start."""
    return deepseek_v3.routing(resolve(config, 0))


def limits(config: KimiConfig, vocab_size: int) -> list[Limit]:
    """Over how many ranks it can be spread."""
    return deepseek_v3.limits(resolve(config, vocab_size))
