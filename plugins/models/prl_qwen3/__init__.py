"""Qwen3 (Yang et al. 2025, arXiv:2505.09388), dense and mixture of experts, at any size."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs
from attrs import validators
from prl import hookimpl, option
from prl.compose.config import ModelConfig, Run
from prl.providers import Model

positive = validators.gt(0)
not_negative = validators.ge(0)


def _divides(config: Any, attribute: attrs.Attribute[int], value: int) -> None:
    if value < 1 or config.heads % value:
        raise ValueError(f"'{attribute.name}' must divide heads ({config.heads}): {value}")


@attrs.frozen(kw_only=True)
class Qwen3Config(ModelConfig):
    """`[model]` with `type = "qwen3"`. The defaults are a toy that trains on a CPU."""

    checkpoint: str = option(
        "", help="folder with a Hugging Face config.json that gives every size; the sizes here must then be left out"
    )
    hidden_size: int = option(128, help="width of the residual stream", validator=positive)
    intermediate_size: int = option(256, help="width of the dense feed-forward layers", validator=positive)
    layers: int = option(4, help="number of layers", validator=positive)
    heads: int = option(4, help="query heads", validator=positive)
    kv_heads: int = option(2, help="key and value heads; divides heads", validator=_divides)
    head_dim: int = option(32, help="size of a head; even", validator=positive)
    rope_theta: float = option(10_000.0, help="base of the rotary positions", validator=positive)
    rms_norm_eps: float = option(1e-6, help="epsilon of every norm", validator=positive)
    tied_embeddings: bool = option(False, help="one matrix for token embeddings and output projection")
    vocab_size: int = option(0, help="rows of the embedding; 0: as many as the tokenizer has", validator=not_negative)
    experts: int = option(0, help="experts of every layer; 0: dense", validator=not_negative)
    experts_per_token: int = option(2, help="experts each token is sent to", validator=positive)
    expert_intermediate_size: int = option(128, help="width of one expert", validator=positive)
    norm_topk_prob: bool = option(True, help="weights of a token's experts sum to one")

    def __attrs_post_init__(self) -> None:
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, for rotary positions turn pairs: {self.head_dim}")
        if self.experts and self.experts_per_token > self.experts:
            raise ValueError(f"experts_per_token must be <= experts ({self.experts}): {self.experts_per_token}")
        if self.checkpoint and (given := _given_sizes(self)):
            raise ValueError(f"checkpoint {self.checkpoint!r} gives every size, so leave out {', '.join(given)}")


def _given_sizes(config: Qwen3Config) -> list[str]:
    fields = attrs.fields(Qwen3Config)
    return [f.name for f in fields if f.name != "checkpoint" and getattr(config, f.name) != f.default]


@hookimpl
def prl_models() -> Iterable[Model]:
    yield Model(
        name="qwen3",
        config=Qwen3Config,
        summary="Qwen3, dense or mixture of experts; sizes from the config or from a checkpoint",
        build="prl_qwen3.network:build",
        weights="prl_qwen3.weights:weight_map",
        limits="prl_qwen3.sizes:limits",
        render="prl_qwen3.chat:renderer",
        routing="prl_qwen3.sizes:routing",
        special_tokens=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        unquantized=(r"\b(embed_tokens|lm_head|mlp\.gate)\.weight$",),
        checkpoint_types=("qwen3", "qwen3_moe"),
    )


@hookimpl
def prl_validate(run: Run) -> Iterable[str]:
    model = run.model
    if isinstance(model, Qwen3Config) and model.checkpoint and not (Path(model.checkpoint) / "config.json").is_file():
        yield f"model.checkpoint: {model.checkpoint!r} is no folder with a config.json"
