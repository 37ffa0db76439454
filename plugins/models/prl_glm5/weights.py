"""GLM-5's tensors under the names of the published checkpoints, and the config.json that goes with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prl.blocks.weight_map import ExpertStack, ListedWeightMap, Operation, Rows

from prl_glm5 import GlmConfig
from prl_glm5.sizes import Sizes, resolve


def weight_map(config: GlmConfig, vocab_size: int) -> ListedWeightMap:
    """Between `prl_glm5.network.build(config, vocab_size)` and a `GlmMoeDsaForCausalLM`."""
    sizes = resolve(config, vocab_size)
    return ListedWeightMap(
        operations=_operations(sizes),
        prefixes={"": "model.", "lm_head.": "lm_head."},
        config=_hf_config(sizes),
        carried=[f"model.layers.{sizes.layers + block}." for block in range(sizes.prediction_layers)],
    )


def _operations(sizes: Sizes) -> list[Operation]:
    expert = sizes.expert_intermediate_size
    latent_rows = (("q_a_proj.weight", sizes.q_rank), ("kv_a_proj_with_mqa.weight", sizes.kv_rank + sizes.rope_dim))
    return [
        Rows("qkv_a_proj.weight", latent_rows),
        _gate_up("shared_experts.", sizes.shared_experts * expert),
        _gate_up("mlp.", sizes.intermediate_size),
        ExpertStack(
            "experts.gate_up_proj",
            sizes.experts,
            (("experts.{}.gate_proj.weight", expert), ("experts.{}.up_proj.weight", expert)),
        ),
        ExpertStack("experts.down_proj", sizes.experts, (("experts.{}.down_proj.weight", sizes.hidden_size),)),
    ]


def _gate_up(stem: str, rows: int) -> Operation:
    return Rows(f"{stem}gate_up_proj.weight", ((f"{stem}gate_proj.weight", rows), (f"{stem}up_proj.weight", rows)))


def _hf_config(sizes: Sizes) -> Mapping[str, Any]:
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
