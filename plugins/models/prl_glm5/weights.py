"""GLM-5's tensors under the names of the published checkpoints."""

from __future__ import annotations

from prl.blocks.weight_map import ExpertStack, ListedWeightMap, Operation, Rows

from prl_glm5 import GlmConfig
from prl_glm5.published import to_json
from prl_glm5.sizes import Sizes, resolve


def weight_map(config: GlmConfig, vocab_size: int) -> ListedWeightMap:
    """Between `prl_glm5.network.build(config, vocab_size)` and a `GlmMoeDsaForCausalLM`."""
    sizes = resolve(config, vocab_size)
    return ListedWeightMap(
        operations=_operations(sizes),
        prefixes={"": "model.", "lm_head.": "lm_head."},
        config=to_json(sizes),
        carried=[f"model.layers.{sizes.layers + block}." for block in range(sizes.prediction_layers)],
    )


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
