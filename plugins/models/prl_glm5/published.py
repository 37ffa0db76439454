"""What a GLM-5 is made of, and its config.json, both ways. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from prl.families import config_json, deepseek_v3
from prl.families.deepseek_v3 import DeepSeekV3Sizes


@attrs.frozen(kw_only=True)
class Sizes(DeepSeekV3Sizes):
    """Every number of the architecture."""

    routed_scale: float = 2.5
    rope_theta: float = 1e6
    positions: int = 202_752
    index_heads: int
    index_head_dim: int
    index_top_k: int
    index_period: int = 1
    """From layer `index_first_period - 1` on, every so many layers have an indexer; the others share its choice."""
    index_first_period: int = 2
    prediction_layers: int
    """Blocks that predict further tokens, which checkpoints keep after the last layer."""

    def has_indexer(self, layer: int) -> bool:
        """Whether a layer chooses for itself."""
        return max(layer - self.index_first_period + 1, 0) % self.index_period == 0


_KEYS = deepseek_v3.KEYS | {
    "index_heads": "index_n_heads",
    "index_head_dim": "index_head_dim",
    "index_top_k": "index_topk",
}


def read(folder: str) -> Sizes:
    """The sizes in a folder's config.json; UserError when it asks for more than there is."""
    file, stored = config_json.read(folder)
    sizes = Sizes(
        **config_json.sizes(file, stored, _KEYS),
        rope_theta=float(config_json.rope(file, stored, kind="default")["rope_theta"]),
        index_period=stored.get("index_topk_freq") or 1,
        index_first_period=stored.get("index_skip_topk_offset") or 2,
        prediction_layers=stored.get("num_nextn_predict_layers") or 0,
    )
    config_json.check(file, stored, to_json(sizes), except_for=deepseek_v3.NOT_COMPARED)
    return sizes


def to_json(sizes: Sizes) -> Mapping[str, Any]:
    """What transformers and vLLM need to build the model of these sizes."""
    return {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "model_type": "glm_moe_dsa",
        **deepseek_v3.to_json(sizes),
        **config_json.written(sizes, _KEYS),
        "rope_theta": sizes.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes.rope_theta},
        "rope_interleave": True,
        "indexer_rope_interleave": True,
        "index_topk_freq": sizes.index_period,
        "index_skip_topk_offset": sizes.index_first_period,
        "indexer_types": ["full" if sizes.has_indexer(layer) else "shared" for layer in range(sizes.layers)],
        "num_nextn_predict_layers": sizes.prediction_layers,
    }
