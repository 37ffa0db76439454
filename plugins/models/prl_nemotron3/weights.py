"""Nemotron-3's tensors under the names of the published checkpoints, and the config.json that goes with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prl.blocks.weight_map import ExpertStack, ListedWeightMap, Operation, Rows

from prl_nemotron3 import NemotronConfig
from prl_nemotron3.sizes import Sizes, resolve

_POSITIONS = 262_144
_PREFIXES = {
    "": "backbone.",
    "embed_tokens.": "backbone.embeddings.",
    "norm.": "backbone.norm_f.",
    "lm_head.": "lm_head.",
}


def weight_map(config: NemotronConfig, vocab_size: int) -> ListedWeightMap:
    """Between `prl_nemotron3.network.build(config, vocab_size)` and a `NemotronHForCausalLM`."""
    sizes = resolve(config, vocab_size)
    return ListedWeightMap(
        operations=_operations(sizes),
        prefixes=_PREFIXES,
        config=_hf_config(sizes),
        carried=("mtp.",) if sizes.prediction_layers else (),
    )


def _operations(sizes: Sizes) -> list[Operation]:
    q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    width = sizes.latent_size or sizes.hidden_size
    return [
        Rows("qkv_proj.weight", (("q_proj.weight", q), ("k_proj.weight", kv), ("v_proj.weight", kv))),
        ExpertStack("experts.up_proj", sizes.experts, (("experts.{}.up_proj.weight", sizes.expert_intermediate_size),)),
        ExpertStack("experts.down_proj", sizes.experts, (("experts.{}.down_proj.weight", width),)),
    ]


def _hf_config(sizes: Sizes) -> Mapping[str, Any]:
    """The layers are told by the pattern alone, which every release of transformers and vLLM reads.

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
