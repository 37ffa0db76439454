"""The sizes of a Nemotron-3, as published or as a toy, and what they allow. Imports no torch."""

from __future__ import annotations

import attrs
from prl.compose.routing import Routing
from prl.families import moe
from prl.providers import Limit

from prl_nemotron3 import NanoConfig, NemotronConfig, SuperConfig, UltraConfig, published
from prl_nemotron3.published import Sizes

ULTRA = Sizes(
    hidden_size=8192,
    pattern="ME" * 3 + ("M*E" + "ME" * 2 + "M*E" + "ME" * 3 + "M*E" + "ME" * 3) * 4 + "ME",
    heads=64,
    kv_heads=2,
    head_dim=128,
    mamba_heads=256,
    experts=512,
    experts_per_token=22,
    expert_intermediate_size=5120,
    shared_intermediate_size=10_240,
    latent_size=2048,
    routed_scale=5.0,
    prediction_layers=1,
)
SUPER = Sizes(
    hidden_size=4096,
    pattern=("ME" * 3 + "M*E") * 3 + ("ME" * 4 + "M*E") * 4 + "ME" * 3 + "M*E" + "ME" * 4,
    heads=32,
    kv_heads=2,
    head_dim=128,
    mamba_heads=128,
    experts=512,
    experts_per_token=22,
    expert_intermediate_size=2688,
    shared_intermediate_size=5376,
    latent_size=1024,
    routed_scale=5.0,
    prediction_layers=1,
)
NANO = Sizes(
    hidden_size=2688,
    pattern=("ME" * 2 + "M*E") * 5 + "ME" * 3 + "M*E" + "ME" * 4,
    heads=32,
    kv_heads=2,
    head_dim=128,
    mamba_heads=64,
    experts=128,
    experts_per_token=6,
    expert_intermediate_size=1856,
    shared_intermediate_size=3712,
    latent_size=None,
    routed_scale=2.5,
    prediction_layers=0,
)
TOY = Sizes(
    vocab_size=0,
    hidden_size=128,
    pattern="MEM*EME",
    heads=4,
    kv_heads=2,
    head_dim=32,
    mamba_heads=8,
    mamba_head_dim=32,
    mamba_groups=4,
    mamba_state=16,
    mamba_chunk=32,
    experts=8,
    experts_per_token=2,
    expert_intermediate_size=96,
    shared_intermediate_size=192,
    latent_size=64,
    routed_scale=5.0,
    prediction_layers=0,
    deviation=0.06,
)
FULL: dict[type[NemotronConfig], Sizes] = {NanoConfig: NANO, SuperConfig: SUPER, UltraConfig: ULTRA}
_TOY_NANO = attrs.evolve(TOY, latent_size=None, routed_scale=NANO.routed_scale)


def _named(config: NemotronConfig) -> Sizes:
    if config.size == "full":
        return FULL[type(config)]
    return _TOY_NANO if isinstance(config, NanoConfig) else TOY


def resolve(config: NemotronConfig, vocab_size: int) -> Sizes:
    """The sizes a config asks for, with a vocabulary of at least the tokenizer's `vocab_size`."""
    sizes = published.read(config.checkpoint) if config.checkpoint else _named(config)
    return moe.resolve(config, sizes, vocab_size)


def routing(config: NemotronConfig) -> Routing:
    """The layers that the pattern calls E."""
    sizes = resolve(config, 0)
    return moe.routing(sizes, (index for index, letter in enumerate(sizes.pattern) if letter == "E"))


def limits(config: NemotronConfig, vocab_size: int) -> list[Limit]:
    """Over how many ranks it can be spread."""
    sizes = resolve(config, vocab_size)
    found = []
    if "*" in sizes.pattern:
        found += [Limit(degree=degree, of="attention heads", count=sizes.heads) for degree in ("tensor", "heads")]
    if "M" in sizes.pattern:
        # Heads of a group share B and C: what is spread over ranks by heads is spread by groups.
        found.append(Limit(degree="tensor", of="groups of Mamba-2", count=sizes.mamba_groups))
    if "E" in sizes.pattern:
        found.append(Limit(degree="expert", of="experts", count=sizes.experts))
    return found
