"""Kimi-K2's tensors under the names of the published checkpoints."""

from __future__ import annotations

from prl.blocks.deepseek_v3 import operations
from prl.blocks.weight_map import ListedWeightMap

from prl_kimi_k2 import KimiConfig, KimiK2Config
from prl_kimi_k2.published import to_json
from prl_kimi_k2.sizes import resolve


def weight_map(config: KimiConfig, vocab_size: int) -> ListedWeightMap:
    """Between `prl_kimi_k2.network.build(config, vocab_size)` and the published layout.

    K2 is a `DeepseekV3ForCausalLM`; K2.5 and later keep the same under `language_model.` beside their vision parts.
    """
    sizes = resolve(config, vocab_size)
    if isinstance(config, KimiK2Config):
        prefixes, carried = {"": "model.", "lm_head.": "lm_head."}, ()
    else:
        prefixes = {"": "language_model.model.", "lm_head.": "language_model.lm_head."}
        carried = ("vision_tower.", "mm_projector.")
    hf_config = to_json(sizes, vision=not isinstance(config, KimiK2Config))
    return ListedWeightMap(operations=operations(sizes), prefixes=prefixes, config=hf_config, carried=carried)
