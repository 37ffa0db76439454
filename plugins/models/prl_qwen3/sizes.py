"""What a Qwen3 is made of, from the `[model]` section or from the config.json of a checkpoint. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from prl.compose.routing import Routing
from prl.errors import UserError
from prl.providers import Limit

from prl_qwen3 import Qwen3Config

_FROM_JSON = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    "vocab_size": "vocab_size",
}
_EXPERTS_FROM_JSON = {
    "experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_intermediate_size": "moe_intermediate_size",
    "norm_topk_prob": "norm_topk_prob",
}
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("qwen3", "qwen3_moe"),
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "use_sliding_window": (False, None),
    "decoder_sparse_step": (1, None),
    "mlp_only_layers": ([], None),
}
"""What this implementation can do, of what a config.json can ask for."""


def resolve(config: Qwen3Config, vocab_size: int) -> Qwen3Config:
    """All sizes, with a vocabulary of at least the tokenizer's `vocab_size`; `checkpoint` is empty in the result."""
    sizes = _read(Path(config.checkpoint) / "config.json") if config.checkpoint else config
    if sizes.vocab_size and sizes.vocab_size < vocab_size:
        where = f"{config.checkpoint}/config.json: vocab_size" if config.checkpoint else "model.vocab_size"
        raise UserError(f"{where} is {sizes.vocab_size}, but the tokenizer has {vocab_size} tokens")
    return attrs.evolve(sizes, vocab_size=sizes.vocab_size or vocab_size)


def routing(config: Qwen3Config) -> Routing:
    """Every layer of a mixture of experts, none of a dense model."""
    sizes = resolve(config, 0)
    return Routing(
        layers=tuple(f"layers.{index}" for index in range(sizes.layers)) if sizes.experts else (),
        experts=sizes.experts,
        experts_per_token=sizes.experts_per_token,
    )


def _read(file: Path) -> Qwen3Config:
    try:
        stored: Mapping[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"model.checkpoint: cannot read {file}: {error}") from error
    if "num_local_experts" in stored:  # what transformers 5 calls it
        stored = {"num_experts": stored["num_local_experts"], **stored}
    for key, allowed in _ONLY.items():
        if stored.get(key) not in allowed:
            raise UserError(f"{file}: {key} = {stored.get(key)!r} is not supported, only {allowed[0]!r}")
    names = _FROM_JSON | (_EXPERTS_FROM_JSON if stored["model_type"] == "qwen3_moe" else {})
    if absent := [key for key in names.values() if key not in stored]:
        raise UserError(f"{file} lacks {', '.join(absent)}")
    return Qwen3Config(rope_theta=_rope_theta(file, stored), **{ours: stored[key] for ours, key in names.items()})


def _rope_theta(file: Path, stored: Mapping[str, Any]) -> float:
    """transformers 5 writes `rope_parameters`, earlier releases `rope_theta` and `rope_scaling`."""
    rope = stored.get("rope_parameters") or stored.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", stored.get("rope_theta"))
    if kind != "default" or theta is None:
        raise UserError(f"{file}: rotary positions of type {kind!r} with theta {theta} are not supported")
    return float(theta)


def limits(config: Qwen3Config, vocab_size: int) -> list[Limit]:
    """Over how many ranks it can be spread."""
    sizes = resolve(config, vocab_size)
    return [
        Limit(degree="tensor", of="key and value heads", count=sizes.kv_heads),
        Limit(degree="heads", of="attention heads", count=sizes.heads),
        Limit(degree="expert", of="experts", count=sizes.experts or 1, reason="" if sizes.experts else "it is dense"),
    ]
