"""A model of the make of DeepSeek-V3 out of blocks, from `prl.families.deepseek_v3` sizes, and its weights' names.

A family puts the parts together in its own `build`, and replaces those in which it differs.
"""

from __future__ import annotations

from prl.blocks.decoder import Decoder, Layer, Sublayer, initialise
from prl.blocks.dsa import Indexer, SharedIndex
from prl.blocks.mla import LatentHeads, MultiHeadLatentAttention
from prl.blocks.mlp import GatedMLP
from prl.blocks.moe import Experts, MixtureOfExperts, SigmoidRouter
from prl.blocks.norm import RMSNorm
from prl.blocks.rope import RotaryEmbedding
from prl.blocks.weight_map import ExpertStack, Operation, Rows
from prl.families.deepseek_v3 import DeepSeekV3Sizes


def decoder(sizes: DeepSeekV3Sizes, layers: list[Layer]) -> Decoder:
    """The model of these layers on the current default device, with fresh weights."""
    model = Decoder(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        layers=layers,
        norm_eps=sizes.rms_norm_eps,
        tied_embeddings=False,
    )
    initialise(model, deviation=sizes.deviation)
    return model


def layer(
    sizes: DeepSeekV3Sizes, attention: MultiHeadLatentAttention, feed_forward: GatedMLP | MixtureOfExperts
) -> Layer:
    """Both mixers, under their names in checkpoints."""
    width, eps = sizes.hidden_size, sizes.rms_norm_eps
    return Layer(
        Sublayer("input_layernorm", RMSNorm(width, eps), "self_attn", attention),
        Sublayer("post_attention_layernorm", RMSNorm(width, eps), "mlp", feed_forward),
    )


def latent_attention(
    sizes: DeepSeekV3Sizes, rope: RotaryEmbedding, indexer: Indexer | SharedIndex | None = None
) -> MultiHeadLatentAttention:
    """Over all tokens, or those the indexer selects."""
    heads = LatentHeads(
        heads=sizes.heads,
        q_rank=sizes.q_rank,
        kv_rank=sizes.kv_rank,
        nope_dim=sizes.nope_dim,
        rope_dim=sizes.rope_dim,
        value_dim=sizes.value_dim,
    )
    return MultiHeadLatentAttention(
        heads, hidden_size=sizes.hidden_size, rope=rope, norm_eps=sizes.rms_norm_eps, indexer=indexer
    )


def feed_forward(sizes: DeepSeekV3Sizes, index: int) -> GatedMLP | MixtureOfExperts:
    """Of layer `index`: dense in the layers at the start, then experts."""
    width, inner = sizes.hidden_size, sizes.expert_intermediate_size
    if index < sizes.dense_layers:
        return GatedMLP(width, sizes.intermediate_size)
    router = SigmoidRouter(
        hidden_size=width,
        experts=sizes.experts,
        experts_per_token=sizes.experts_per_token,
        scale=sizes.routed_scale,
    )
    return MixtureOfExperts(
        router,
        Experts(experts=sizes.experts, hidden_size=width, intermediate_size=inner),
        shared=GatedMLP(width, sizes.shared_experts * inner),
    )


def operations(sizes: DeepSeekV3Sizes) -> list[Operation]:
    """Between the tensors of such a model and those of its checkpoints, for a `ListedWeightMap`."""
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
