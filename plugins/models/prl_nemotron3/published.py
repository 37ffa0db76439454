"""What a Nemotron-3 is made of, and its config.json, both ways. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from prl.errors import UserError
from prl.families import config_json, moe
from prl.families.moe import MoeSizes


@attrs.frozen(kw_only=True)
class Sizes(MoeSizes):
    """Every number of the architecture."""

    vocab_size: int = 131_072
    pattern: str
    """A letter per layer: M Mamba-2, * attention, E experts."""
    heads: int
    kv_heads: int
    head_dim: int
    mamba_heads: int
    mamba_head_dim: int = 64
    mamba_groups: int = 8
    mamba_state: int = 128
    mamba_kernel: int = 4
    mamba_chunk: int = 128
    shared_intermediate_size: int
    latent_size: int | None
    """Width the experts work on; None: the residual stream's."""
    norm_eps: float = 1e-5
    prediction_layers: int
    """Blocks that predict further tokens, which checkpoints keep under `mtp.`"""


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
_MAMBA = {
    "expand": 2,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "use_conv_bias": True,
    "use_bias": False,
}
"""`mamba_ssm_cache_dtype`: what an engine keeps the state in; less than float32 drifts from the trainer."""
_LETTERS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "moe": "E"}
"""Layers as published configs name them, and as transformers 5 does."""
_NOT_COMPARED = (
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


def read(folder: str) -> Sizes:
    """The sizes in a folder's config.json; UserError when it asks for more than there is."""
    file, stored = config_json.read(folder)
    sizes = Sizes(
        **config_json.sizes(file, stored, _KEYS),
        pattern=_pattern(file, stored),
        latent_size=stored.get("moe_latent_size"),
        prediction_layers=stored.get("num_nextn_predict_layers") or 0,
    )
    config_json.check(file, stored, to_json(sizes), except_for=_NOT_COMPARED)
    return sizes


def _pattern(file: Path, stored: Mapping[str, Any]) -> str:
    """From `hybrid_override_pattern`, or from the list of layers of newer configs."""
    listed = stored.get("layers_block_type") or stored.get("layer_types")
    pattern = stored.get("hybrid_override_pattern") or "".join(_LETTERS.get(kind, kind) for kind in listed or ())
    if not pattern or set(pattern) - set("ME*"):
        raise UserError(f"{file}: layers {pattern!r} are not supported, only M (Mamba-2), * (attention), E (experts)")
    return str(pattern)


def to_json(sizes: Sizes) -> Mapping[str, Any]:
    """What transformers and vLLM need to build the model of these sizes.

    The layers are told by the pattern alone, which every release of transformers and vLLM reads, and makes the list
    `layers_block_type` of. Beside it that list would be refused: under its published names by transformers 5.17, under
    any by the configuration classes of older releases, where it is a property that nobody can set.
    """
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        **config_json.written(sizes, _KEYS),
        "num_hidden_layers": len(sizes.pattern),
        "hybrid_override_pattern": sizes.pattern,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "norm_eps": sizes.norm_eps,
        "max_position_embeddings": _POSITIONS,
        "num_nextn_predict_layers": sizes.prediction_layers,
        "tie_word_embeddings": False,
        **_MAMBA,
        "n_shared_experts": 1,
        "intermediate_size": sizes.expert_intermediate_size,  # of dense MLPs, of which there are none
        "moe_latent_size": sizes.latent_size,
        **moe.SIGMOID_ROUTER,
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
    }
