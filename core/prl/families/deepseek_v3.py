"""Sizes of the make of DeepSeek-V3 (DeepSeek-AI 2024, arXiv:2412.19437), and what a config.json says of them.

Multi-head latent attention, some dense layers first, then experts behind a sigmoid router. GLM-5 and Kimi-K2 are such
models; each adds what it has besides. `prl.blocks.deepseek_v3` builds layers of these sizes. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from prl.compose.routing import Routing
from prl.families import config_json, moe
from prl.families.moe import MoeConfig, MoeSizes, positive
from prl.providers import Limit, option


@attrs.frozen(kw_only=True)
class DeepSeekV3Config(MoeConfig):
    """Base of `[model]` sections."""

    layers: int | None = option(None, help="number of layers, if not the size's", validator=positive)
    kv_rank: int | None = option(None, help="width of latent keys and values, if not the size's", validator=positive)
    rope_dim: int | None = option(None, help="width of a head's rotated part, if not the size's", validator=positive)


@attrs.frozen(kw_only=True)
class DeepSeekV3Sizes(MoeSizes):
    """Numbers of the architecture, to which a family adds its own."""

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
    shared_experts: int
    rms_norm_eps: float = 1e-5
    rope_theta: float
    positions: int


KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "dense_layers": "first_k_dense_replace",
    "intermediate_size": "intermediate_size",
    "heads": "num_attention_heads",
    "q_rank": "q_lora_rank",
    "kv_rank": "kv_lora_rank",
    "nope_dim": "qk_nope_head_dim",
    "rope_dim": "qk_rope_head_dim",
    "value_dim": "v_head_dim",
    "experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "shared_experts": "n_shared_experts",
    "expert_intermediate_size": "moe_intermediate_size",
    "routed_scale": "routed_scaling_factor",
    "rms_norm_eps": "rms_norm_eps",
    "positions": "max_position_embeddings",
}
"""Size -> key of a config.json; `rope_theta` has a place of its own (`config_json.rope`)."""
NOT_COMPARED = ("architectures", "rope_theta", "rope_parameters", "num_key_value_heads", "moe_router_dtype")
"""Keys that another config.json may write otherwise, or leave to the plugin."""


def to_json(sizes: DeepSeekV3Sizes) -> Mapping[str, Any]:
    """What every such config.json says, rotary positions apart."""
    return {
        **config_json.written(sizes, KEYS),
        "num_key_value_heads": sizes.heads,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "moe_layer_freq": 1,
        **moe.SIGMOID_ROUTER,
    }


def routing(sizes: DeepSeekV3Sizes) -> Routing:
    """Every layer but the dense ones at the start."""
    return moe.routing(sizes, range(sizes.dense_layers, sizes.layers))


def limits(sizes: DeepSeekV3Sizes) -> list[Limit]:
    """Over how many ranks it can be spread."""
    return [
        Limit(degree="expert", of="experts", count=sizes.experts),
        Limit(degree="tensor", of="attention heads", count=sizes.heads),
    ]
