"""Qwen3's tensors under Hugging Face's names, and the config.json that goes with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prl.blocks.weight_map import ExpertStack, ListedWeightMap, Operation, Rows, Tied

from prl_qwen3 import Qwen3Config
from prl_qwen3.sizes import resolve

_POSITIONS = 40_960
"""`max_position_embeddings` of the published models; rotary positions themselves have no end."""


def weight_map(config: Qwen3Config, vocab_size: int) -> ListedWeightMap:
    """Between `prl_qwen3.network.build(config, vocab_size)` and a `Qwen3ForCausalLM` or `Qwen3MoeForCausalLM`."""
    sizes = resolve(config, vocab_size)
    q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    operations: list[Operation] = [
        Rows("qkv_proj.weight", (("q_proj.weight", q), ("k_proj.weight", kv), ("v_proj.weight", kv))),
        *(_expert_operations(sizes) if sizes.experts else [_gate_up(sizes.intermediate_size)]),
    ]
    if sizes.tied_embeddings:
        operations.append(Tied("embed_tokens.weight", copies=("lm_head.weight",)))
    return ListedWeightMap(
        operations=operations, prefixes={"": "model.", "lm_head.": "lm_head."}, config=_hf_config(sizes)
    )


def _gate_up(rows: int) -> Operation:
    return Rows("gate_up_proj.weight", (("gate_proj.weight", rows), ("up_proj.weight", rows)))


def _expert_operations(sizes: Qwen3Config) -> list[Operation]:
    rows = sizes.expert_intermediate_size
    gate_up = (("{}.gate_proj.weight", rows), ("{}.up_proj.weight", rows))
    return [
        ExpertStack("gate_up_proj", sizes.experts, gate_up),
        ExpertStack("down_proj", sizes.experts, (("{}.down_proj.weight", sizes.hidden_size),)),
    ]


def _hf_config(sizes: Qwen3Config) -> Mapping[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM" if sizes.experts else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if sizes.experts else "qwen3",
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "rms_norm_eps": sizes.rms_norm_eps,
        "rope_theta": sizes.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes.rope_theta},
        "max_position_embeddings": _POSITIONS,
        "tie_word_embeddings": sizes.tied_embeddings,
        "vocab_size": sizes.vocab_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        **(_hf_experts(sizes) if sizes.experts else {}),
    }


def _hf_experts(sizes: Qwen3Config) -> Mapping[str, Any]:
    return {
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.experts_per_token,
        "moe_intermediate_size": sizes.expert_intermediate_size,
        "norm_topk_prob": sizes.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
