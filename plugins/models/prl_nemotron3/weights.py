"""Nemotron-3's tensors under the names of the published checkpoints."""

from __future__ import annotations

from prl.blocks.weight_map import ExpertStack, ListedWeightMap, Operation, Rows

from prl_nemotron3 import NemotronConfig
from prl_nemotron3.published import Sizes, to_json
from prl_nemotron3.sizes import resolve

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
        config=to_json(sizes),
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
