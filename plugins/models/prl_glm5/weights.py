"""GLM-5's tensors under the names of the published checkpoints."""

from __future__ import annotations

from prl.blocks.deepseek_v3 import operations
from prl.blocks.weight_map import ListedWeightMap

from prl_glm5 import GlmConfig
from prl_glm5.published import to_json
from prl_glm5.sizes import resolve


def weight_map(config: GlmConfig, vocab_size: int) -> ListedWeightMap:
    """Between `prl_glm5.network.build(config, vocab_size)` and a `GlmMoeDsaForCausalLM`."""
    sizes = resolve(config, vocab_size)
    return ListedWeightMap(
        operations=operations(sizes),
        prefixes={"": "model.", "lm_head.": "lm_head."},
        config=to_json(sizes),
        carried=[f"model.layers.{sizes.layers + block}." for block in range(sizes.prediction_layers)],
    )
