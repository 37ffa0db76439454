"""What a Nemotron-3 is made of, as published or as a toy. Imports no torch."""

from __future__ import annotations

import attrs
from prl.compose.routing import Routing
from prl.errors import UserError
from prl.providers import Limit

from prl_nemotron3 import NanoConfig, NemotronConfig, SuperConfig, UltraConfig, published


@attrs.frozen(kw_only=True)
class Sizes:
    """Every number of the architecture."""

    vocab_size: int = 131_072
    """0 in a toy: as many as the tokenizer has."""
    hidden_size: int
    pattern: str
    """A letter per layer: M Mamba-2, * attention, E experts."""
    heads: int
    kv_heads: int
    head_dim: int
    mamba_heads: int
    mamba_head_dim: int = 64
    mamba_groups: int = 8
    mamba_state: int = 128
    mamba_kernel: int = 4
    mamba_chunk: int = 128
    experts: int
    experts_per_token: int
    expert_intermediate_size: int
    shared_intermediate_size: int
    latent_size: int | None
    """Width the experts work on; None: the residual stream's."""
    routed_scale: float
    norm_eps: float = 1e-5
    prediction_layers: int
    """Blocks that predict further tokens, which checkpoints keep under `mtp.`"""
    deviation: float = 0.02
    """Of fresh weights."""


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
_OVERRIDES = ("hidden_size", "experts", "experts_per_token", "expert_intermediate_size")


def _read(folder: str) -> Sizes:
    fields, check = published.read(folder)
    sizes = Sizes(**fields)
    check(sizes)
    return sizes


def _named(config: NemotronConfig) -> Sizes:
    if config.size == "full":
        return FULL[type(config)]
    return _TOY_NANO if isinstance(config, NanoConfig) else TOY


def resolve(config: NemotronConfig, vocab_size: int) -> Sizes:
    """The sizes a config asks for, with a vocabulary of at least the tokenizer's `vocab_size`."""
    sizes = _read(config.checkpoint) if config.checkpoint else _named(config)
    if sizes.vocab_size and sizes.vocab_size < vocab_size:
        named = f"model.checkpoint {config.checkpoint!r}" if config.checkpoint else f'model.size "{config.size}"'
        raise UserError(
            f"{named} has {sizes.vocab_size} tokens, but the tokenizer has {vocab_size}: use the tokenizer of the "
            "published model"
        )
    given = {name: value for name in _OVERRIDES if (value := getattr(config, name)) is not None}
    pattern = config.pattern or sizes.pattern
    sizes = attrs.evolve(sizes, vocab_size=sizes.vocab_size or vocab_size, pattern=pattern, **given)
    if sizes.experts_per_token > sizes.experts:
        raise UserError(f"model.experts_per_token must be <= {sizes.experts} experts: {sizes.experts_per_token}")
    return sizes


def routing(config: NemotronConfig) -> Routing:
    """The layers that the pattern calls E."""
    sizes = resolve(config, 0)
    return Routing(
        layers=tuple(f"layers.{index}" for index, letter in enumerate(sizes.pattern) if letter == "E"),
        experts=sizes.experts,
        experts_per_token=sizes.experts_per_token,
    )


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
