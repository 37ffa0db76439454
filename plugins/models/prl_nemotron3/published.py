"""Nemotron-3's config.json, both ways. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prl import checkpoint_config
from prl.errors import UserError

if TYPE_CHECKING:
    from prl_nemotron3.sizes import Sizes

_POSITIONS = 262_144
_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mamba_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "mamba_groups": "n_groups",
    "mamba_state": "ssm_state_size",
    "mamba_kernel": "conv_kernel",
    "mamba_chunk": "chunk_size",
    "experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_intermediate_size": "moe_intermediate_size",
    "shared_intermediate_size": "moe_shared_expert_intermediate_size",
    "routed_scale": "routed_scaling_factor",
    "norm_eps": "layer_norm_epsilon",
}
_LETTERS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "moe": "E"}
"""Layers as published configs name them, and as transformers 5 does."""
NOT_COMPARED = (
    "architectures",
    "hybrid_override_pattern",
    "intermediate_size",
    "norm_eps",
    "max_position_embeddings",
    "expand",
    "mamba_ssm_cache_dtype",
    "moe_router_dtype",
)
"""Keys of `to_json` that another config.json may write otherwise, or leave to the plugin."""


def read(folder: str) -> tuple[dict[str, Any], Callable[[Sizes], None]]:
    """The fields of `Sizes`, and a check of what else the file asks for, to be called with these sizes."""
    file, stored = checkpoint_config.read(folder)
    fields = checkpoint_config.sizes(file, stored, _KEYS)
    fields |= {
        "pattern": _pattern(file, stored),
        "latent_size": stored.get("moe_latent_size"),
        "prediction_layers": stored.get("num_nextn_predict_layers") or 0,
    }

    def check(sizes: Sizes) -> None:
        checkpoint_config.check(file, stored, to_json(sizes), except_for=NOT_COMPARED)

    return fields, check


def _pattern(file: Path, stored: Mapping[str, Any]) -> str:
    """From `hybrid_override_pattern`, or from the list of layers of newer configs."""
    listed = stored.get("layers_block_type") or stored.get("layer_types")
    pattern = stored.get("hybrid_override_pattern") or "".join(_LETTERS.get(kind, kind) for kind in listed or ())
    if not pattern or set(pattern) - set("ME*"):
        raise UserError(f"{file}: layers {pattern!r} are not supported, only M (Mamba-2), * (attention), E (experts)")
    return str(pattern)


def to_json(sizes: Sizes) -> Mapping[str, Any]:
    """What transformers and vLLM need to build the model of these sizes.

    The layers are told by the pattern alone, which every release of transformers and vLLM reads.

    transformers 5.17 refuses the pattern beside the published `layers_block_type`, whose names it otherwise translates.
    """
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": len(sizes.pattern),
        "hybrid_override_pattern": sizes.pattern,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "layer_norm_epsilon": sizes.norm_eps,
        "norm_eps": sizes.norm_eps,
        "max_position_embeddings": _POSITIONS,
        "num_nextn_predict_layers": sizes.prediction_layers,
        "tie_word_embeddings": False,
        **_mamba(sizes),
        **_experts(sizes),
    }


def _mamba(sizes: Sizes) -> Mapping[str, Any]:
    """`mamba_ssm_cache_dtype`: what an engine keeps the state in; less than float32 drifts from the trainer."""
    return {
        "mamba_num_heads": sizes.mamba_heads,
        "mamba_head_dim": sizes.mamba_head_dim,
        "n_groups": sizes.mamba_groups,
        "ssm_state_size": sizes.mamba_state,
        "conv_kernel": sizes.mamba_kernel,
        "chunk_size": sizes.mamba_chunk,
        "expand": 2,
        "mamba_hidden_act": "silu",
        "mamba_proj_bias": False,
        "mamba_ssm_cache_dtype": "float32",
        "use_conv_bias": True,
        "use_bias": False,
    }


def _experts(sizes: Sizes) -> Mapping[str, Any]:
    """`intermediate_size` is for layers of dense MLPs, of which there are none."""
    return {
        "n_routed_experts": sizes.experts,
        "num_experts_per_tok": sizes.experts_per_token,
        "n_shared_experts": 1,
        "intermediate_size": sizes.expert_intermediate_size,
        "moe_intermediate_size": sizes.expert_intermediate_size,
        "moe_shared_expert_intermediate_size": sizes.shared_intermediate_size,
        "moe_latent_size": sizes.latent_size,
        "n_group": 1,
        "topk_group": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": sizes.routed_scale,
        "moe_router_dtype": "float32",
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
    }
