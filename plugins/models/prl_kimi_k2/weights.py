"""Kimi-K2's tensors under the names of the published checkpoints."""

from __future__ import annotations

from prl.blocks.weight_map import ExpertStack, ListedWeightMap, Operation, Rows

from prl_kimi_k2 import KimiConfig, KimiK2Config
from prl_kimi_k2.published import to_json
from prl_kimi_k2.sizes import Sizes, resolve


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
