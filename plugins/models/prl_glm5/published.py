"""GLM-5's config.json, both ways. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from prl import checkpoint_config

if TYPE_CHECKING:
    from prl_glm5.sizes import Sizes

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
    "index_heads": "index_n_heads",
    "index_head_dim": "index_head_dim",
    "index_top_k": "index_topk",
}
NOT_COMPARED = ("architectures", "rope_theta", "rope_parameters", "num_key_value_heads", "moe_router_dtype")
"""Keys of `to_json` that another config.json may write otherwise, or leave to the plugin."""


def read(folder: str) -> tuple[dict[str, Any], Callable[[Sizes], None]]:
    """The fields of `Sizes`, and a check of what else the file asks for, to be called with these sizes."""
    file, stored = checkpoint_config.read(folder)
    fields = checkpoint_config.sizes(file, stored, _KEYS)
    fields |= {
        "rope_theta": float(checkpoint_config.rope(file, stored, kind="default")["rope_theta"]),
        "index_period": stored.get("index_topk_freq") or 1,
        "index_first_period": stored.get("index_skip_topk_offset") or 2,
        "prediction_layers": stored.get("num_nextn_predict_layers") or 0,
    }

    def check(sizes: Sizes) -> None:
        checkpoint_config.check(file, stored, to_json(sizes), except_for=NOT_COMPARED)

    return fields, check


def to_json(sizes: Sizes) -> Mapping[str, Any]:
    """What transformers and vLLM need to build the model of these sizes."""
    return {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "model_type": "glm_moe_dsa",
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.layers,
        "first_k_dense_replace": sizes.dense_layers,
        "intermediate_size": sizes.intermediate_size,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "rms_norm_eps": sizes.rms_norm_eps,
        "max_position_embeddings": sizes.positions,
        "rope_theta": sizes.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes.rope_theta},
        "num_nextn_predict_layers": sizes.prediction_layers,
        "tie_word_embeddings": False,
        **_attention(sizes),
        **_routing(sizes),
    }


def _attention(sizes: Sizes) -> Mapping[str, Any]:
    return {
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "q_lora_rank": sizes.q_rank,
        "kv_lora_rank": sizes.kv_rank,
        "qk_nope_head_dim": sizes.nope_dim,
        "qk_rope_head_dim": sizes.rope_dim,
        "v_head_dim": sizes.value_dim,
        "rope_interleave": True,
        "index_n_heads": sizes.index_heads,
        "index_head_dim": sizes.index_head_dim,
        "index_topk": sizes.index_top_k,
        "indexer_rope_interleave": True,
        "index_topk_freq": sizes.index_period,
        "index_skip_topk_offset": sizes.index_first_period,
        "indexer_types": ["full" if sizes.has_indexer(layer) else "shared" for layer in range(sizes.layers)],
    }


def _routing(sizes: Sizes) -> Mapping[str, Any]:
    """Without `scoring_func` and `topk_method` vLLM would route by softmax and drop the correction."""
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
