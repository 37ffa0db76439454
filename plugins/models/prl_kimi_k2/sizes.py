"""What a Kimi-K2 is made of, as published or as a toy. Imports no torch."""

from __future__ import annotations

import attrs
from prl.compose.routing import Routing
from prl.errors import UserError
from prl.providers import Limit

from prl_kimi_k2 import KimiConfig, KimiK2Config, published


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
    routed_scale: float = 2.827
    rms_norm_eps: float = 1e-5
    rope_theta: float = 50_000.0
    yarn_factor: float = 64.0
    yarn_original_length: int
    yarn_beta_fast: float = 32.0
    positions: int = 262_144
    deviation: float = 0.02
    """Of fresh weights."""


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


def _read(config: KimiConfig) -> Sizes:
    fields, check = published.read(config.checkpoint, vision=not isinstance(config, KimiK2Config))
    sizes = Sizes(**fields)
    check(sizes)
    return sizes


def _named(config: KimiConfig) -> Sizes:
    if config.size == "toy":
        return TOY
    return FULL_K2 if isinstance(config, KimiK2Config) else FULL


def resolve(config: KimiConfig, vocab_size: int) -> Sizes:
    """The sizes a config asks for, with a vocabulary of at least the tokenizer's `vocab_size`."""
    sizes = _read(config) if config.checkpoint else _named(config)
    if sizes.vocab_size and sizes.vocab_size < vocab_size:
        named = f"model.checkpoint {config.checkpoint!r}" if config.checkpoint else f'model.size "{config.size}"'
        raise UserError(
            f"{named} has {sizes.vocab_size} tokens, but the tokenizer has {vocab_size}: use the tokenizer of the "
            "published model"
        )
    overrides = (
        "layers",
        "hidden_size",
        "experts",
        "experts_per_token",
        "expert_intermediate_size",
        "kv_rank",
        "rope_dim",
    )
    given = {name: value for name in overrides if (value := getattr(config, name)) is not None}
    sizes = attrs.evolve(sizes, vocab_size=sizes.vocab_size or vocab_size, **given)
    if sizes.experts_per_token > sizes.experts:
        raise UserError(f"model.experts_per_token must be <= {sizes.experts} experts: {sizes.experts_per_token}")
    return sizes


def routing(config: KimiConfig) -> Routing:
    """Every layer but the dense ones at the start."""
    sizes = resolve(config, 0)
    return Routing(
        layers=tuple(f"layers.{index}" for index in range(sizes.dense_layers, sizes.layers)),
        experts=sizes.experts,
        experts_per_token=sizes.experts_per_token,
    )


def limits(config: KimiConfig, vocab_size: int) -> list[Limit]:
    """Over how many ranks it can be spread."""
    sizes = resolve(config, vocab_size)
    return [
        Limit(degree="expert", of="experts", count=sizes.experts),
        Limit(degree="tensor", of="attention heads", count=sizes.heads),
    ]
