"""What a Kimi-K2 is made of, and its config.json, both ways. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from prl.errors import UserError
from prl.families import config_json, deepseek_v3
from prl.families.deepseek_v3 import DeepSeekV3Sizes


@attrs.frozen(kw_only=True)
class Sizes(DeepSeekV3Sizes):
    """Every number of the architecture."""

    routed_scale: float = 2.827
    rope_theta: float = 50_000.0
    positions: int = 262_144
    yarn_factor: float = 64.0
    yarn_original_length: int
    yarn_beta_fast: float = 32.0


_YARN = {
    "yarn_factor": "factor",
    "yarn_original_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
}
_NOT_COMPARED = (*deepseek_v3.NOT_COMPARED, "model_type", "rope_scaling", "num_nextn_predict_layers")


def read(folder: str, *, vision: bool) -> Sizes:
    """The sizes in a folder's config.json; UserError when it asks for more than there is."""
    file, stored = config_json.read(folder)
    if ("text_config" in stored) != vision:
        seen, kind = ("no vision parts", "kimi-k2") if vision else ("vision parts", "kimi-k2.5 or kimi-k2.7")
        raise UserError(f"{file} is of a model with {seen}: choose model.type {kind}")
    rope = config_json.rope(file, stored, kind="yarn")
    if rope.get("mscale", 1) != rope.get("mscale_all_dim", 1):
        raise UserError(f"{file}: rotary positions {rope} are not supported, only yarn with mscale = mscale_all_dim")
    sizes = Sizes(
        **config_json.sizes(file, stored, deepseek_v3.KEYS),
        **config_json.sizes(file, rope, _YARN),
        rope_theta=float(rope["rope_theta"]),
    )
    config_json.check(file, stored, _text_config(sizes), except_for=_NOT_COMPARED)
    return sizes


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


def _text_config(sizes: Sizes) -> Mapping[str, Any]:
    """Positions as transformers before 5 and vLLM read them, and as transformers 5 does."""
    yarn = {**config_json.written(sizes, _YARN), "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        **deepseek_v3.to_json(sizes),
        "rope_theta": sizes.rope_theta,
        "rope_scaling": {"type": "yarn", **yarn},
        "rope_parameters": {"rope_type": "yarn", "rope_theta": sizes.rope_theta, **yarn},
        "num_nextn_predict_layers": 0,
    }
