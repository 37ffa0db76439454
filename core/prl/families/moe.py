"""Families of mixtures of experts: what their `[model]` sections and their sizes have in common. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

import attrs
from attrs import validators

from prl.compose.config import ModelConfig
from prl.compose.routing import Routing
from prl.errors import UserError
from prl.providers import option

positive = validators.optional(validators.gt(0))


@attrs.frozen(kw_only=True)
class MoeConfig(ModelConfig):
    """Base of `[model]` sections. A field with the name of a size changes that size, unless it is None or empty."""

    size: Literal["toy", "full"] = option("toy", help="toy: trains on a CPU; full: as published")
    checkpoint: str = option("", help="folder with a Hugging Face config.json that gives every size, instead of `size`")
    hidden_size: int | None = option(None, help="width of the residual stream, if not the size's", validator=positive)
    experts: int | None = option(None, help="experts of a layer, if not the size's", validator=positive)
    experts_per_token: int | None = option(
        None, help="experts each token is sent to, if not the size's", validator=positive
    )
    expert_intermediate_size: int | None = option(
        None, help="width of one expert, if not the size's", validator=positive
    )


@attrs.frozen(kw_only=True)
class MoeSizes:
    """Numbers of every such architecture, to which a family adds its own."""

    vocab_size: int
    """0 in a toy: as many as the tokenizer has."""
    hidden_size: int
    experts: int
    experts_per_token: int
    expert_intermediate_size: int
    routed_scale: float
    deviation: float = 0.02
    """Of fresh weights."""


SizesT = TypeVar("SizesT", bound=MoeSizes)

SIGMOID_ROUTER: Mapping[str, Any] = {
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "moe_router_dtype": "float32",
}
"""What a config.json says of `prl.blocks.moe.SigmoidRouter`. Without `scoring_func` and `topk_method` vLLM would route
by softmax and drop the correction; without `moe_router_dtype` it would compute the router in bfloat16."""


def resolve(config: MoeConfig, sizes: SizesT, vocab_size: int) -> SizesT:
    """`sizes`, which are those of `config.checkpoint` or `config.size`, with what else the config asks for.

    The vocabulary is at least the tokenizer's `vocab_size`; UserError where the sizes have a smaller one.
    """
    if sizes.vocab_size and sizes.vocab_size < vocab_size:
        named = f"model.checkpoint {config.checkpoint!r}" if config.checkpoint else f'model.size "{config.size}"'
        raise UserError(
            f"{named} has {sizes.vocab_size} tokens, but the tokenizer has {vocab_size}: use the tokenizer of the "
            "published model"
        )
    names = {field.name for field in attrs.fields(type(sizes))} & {field.name for field in attrs.fields(type(config))}
    given = {name: value for name in names if (value := getattr(config, name))}
    sizes = attrs.evolve(sizes, **{"vocab_size": sizes.vocab_size or vocab_size, **given})
    if sizes.experts_per_token > sizes.experts:
        raise UserError(f"model.experts_per_token must be <= {sizes.experts} experts: {sizes.experts_per_token}")
    return sizes


def routing(sizes: MoeSizes, layers: Iterable[int]) -> Routing:
    """Of a model whose `layers` have the experts."""
    return Routing(
        layers=tuple(f"layers.{index}" for index in layers),
        experts=sizes.experts,
        experts_per_token=sizes.experts_per_token,
    )
