"""Kimi-K2's config.json, both ways. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from prl import checkpoint_config
from prl.errors import UserError

if TYPE_CHECKING:
    from prl_kimi_k2.sizes import Sizes

_KEYS = {
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
_YARN = {
    "yarn_factor": "factor",
    "yarn_original_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
}
NOT_COMPARED = (
    "architectures",
    "model_type",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "num_key_value_heads",
    "moe_router_dtype",
    "num_nextn_predict_layers",
)
"""Keys of `to_json` that another config.json may write otherwise, or leave to the plugin."""


def read(folder: str, *, vision: bool) -> tuple[dict[str, Any], Callable[[Sizes], None]]:
    """The fields of `Sizes`, and a check of what else the file asks for, to be called with these sizes."""
    file, stored = checkpoint_config.read(folder)
    if ("text_config" in stored) != vision:
        seen, kind = ("no vision parts", "kimi-k2") if vision else ("vision parts", "kimi-k2.5 or kimi-k2.7")
        raise UserError(f"{file} is of a model with {seen}: choose model.type {kind}")
    rope = checkpoint_config.rope(file, stored, kind="yarn")
    if rope.get("mscale", 1) != rope.get("mscale_all_dim", 1):
        raise UserError(f"{file}: rotary positions {rope} are not supported, only yarn with mscale = mscale_all_dim")
    fields = checkpoint_config.sizes(file, stored, _KEYS) | checkpoint_config.sizes(file, rope, _YARN)
    fields["rope_theta"] = float(rope["rope_theta"])

    def check(sizes: Sizes) -> None:
        checkpoint_config.check(file, stored, _text_config(sizes), except_for=NOT_COMPARED)

    return fields, check


def to_json(sizes: Sizes, *, vision: bool) -> Mapping[str, Any]:
    """What transformers and vLLM need to build the model of these sizes: K2's, or that of K2.5 and later."""
    text = _text_config(sizes)
    if not vision:
        return text
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "text_config": text,
        "tie_word_embeddings": False,
    }


def _text_config(sizes: Sizes) -> dict[str, Any]:
    """Without `scoring_func` and `topk_method` vLLM would route by softmax and drop the correction; without
    `moe_router_dtype` it would compute the router in bfloat16.
    """
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.layers,
        "first_k_dense_replace": sizes.dense_layers,
        "intermediate_size": sizes.intermediate_size,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "q_lora_rank": sizes.q_rank,
        "kv_lora_rank": sizes.kv_rank,
        "qk_nope_head_dim": sizes.nope_dim,
        "qk_rope_head_dim": sizes.rope_dim,
        "v_head_dim": sizes.value_dim,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "rms_norm_eps": sizes.rms_norm_eps,
        "max_position_embeddings": sizes.positions,
        "num_nextn_predict_layers": 0,
        "tie_word_embeddings": False,
        **_routing(sizes),
        **_positions(sizes),
    }


def _routing(sizes: Sizes) -> Mapping[str, Any]:
    return {
        "n_routed_experts": sizes.experts,
        "num_experts_per_tok": sizes.experts_per_token,
        "n_shared_experts": sizes.shared_experts,
        "moe_intermediate_size": sizes.expert_intermediate_size,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": sizes.routed_scale,
        "moe_router_dtype": "float32",
    }


def _positions(sizes: Sizes) -> Mapping[str, Any]:
    """As transformers before 5 and vLLM read it, and as transformers 5 does."""
    yarn = {
        "factor": sizes.yarn_factor,
        "original_max_position_embeddings": sizes.yarn_original_length,
        "beta_fast": sizes.yarn_beta_fast,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    return {
        "rope_theta": sizes.rope_theta,
        "rope_scaling": {"type": "yarn", **yarn},
        "rope_parameters": {"rope_type": "yarn", "rope_theta": sizes.rope_theta, **yarn},
    }
