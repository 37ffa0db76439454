"""Kimi-K2's tensors under the names of the published checkpoints, and the config.json that goes with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prl.blocks.weight_map import ExpertStack, ListedWeightMap, Operation, Rows

from prl_kimi_k2 import KimiConfig, KimiK2Config
from prl_kimi_k2.sizes import Sizes, resolve

_POSITIONS = 262_144


def weight_map(config: KimiConfig, vocab_size: int) -> ListedWeightMap:
    """Between `prl_kimi_k2.network.build(config, vocab_size)` and the published layout.

    K2 is a `DeepseekV3ForCausalLM`; K2.5 and later keep the same under `language_model.` beside their vision parts.
    """
    sizes = resolve(config, vocab_size)
    text = _text_config(sizes)
    if isinstance(config, KimiK2Config):
        prefixes, hf_config, carried = {"": "model.", "lm_head.": "lm_head."}, text, ()
    else:
        prefixes = {"": "language_model.model.", "lm_head.": "language_model.lm_head."}
        hf_config, carried = _with_vision(text), ("vision_tower.", "mm_projector.")
    return ListedWeightMap(operations=_operations(sizes), prefixes=prefixes, config=hf_config, carried=carried)


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
        "max_position_embeddings": _POSITIONS,
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


def _with_vision(text: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "text_config": text,
        "tie_word_embeddings": False,
    }
