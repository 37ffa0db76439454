"""GLM-5 out of shared blocks: sparse latent attention, some dense layers first, then experts."""

from __future__ import annotations

from prl.blocks.decoder import Decoder, Layer, Sublayer, initialise
from prl.blocks.dsa import Indexer, SharedIndex
from prl.blocks.mla import LatentHeads, MultiHeadLatentAttention
from prl.blocks.mlp import GatedMLP
from prl.blocks.moe import Experts, MixtureOfExperts, SigmoidRouter
from prl.blocks.norm import RMSNorm
from prl.blocks.rope import RotaryEmbedding

from prl_glm5 import GlmConfig
from prl_glm5.sizes import Sizes, resolve


def build(config: GlmConfig, vocab_size: int) -> Decoder:
    """The model on the current default device, with fresh weights."""
    sizes = resolve(config, vocab_size)
    rope = RotaryEmbedding(sizes.rope_dim, sizes.rope_theta, interleaved=True)
    model = Decoder(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        layers=[_layer(sizes, rope, index) for index in range(sizes.layers)],
        norm_eps=sizes.rms_norm_eps,
        tied_embeddings=False,
    )
    initialise(model, deviation=sizes.deviation)
    return model


def _layer(sizes: Sizes, rope: RotaryEmbedding, index: int) -> Layer:
    width, eps = sizes.hidden_size, sizes.rms_norm_eps
    feed_forward = GatedMLP(width, sizes.intermediate_size) if index < sizes.dense_layers else _experts(sizes)
    indexer = _indexer(sizes, rope) if sizes.has_indexer(index) else SharedIndex(sizes.index_top_k)
    return Layer(
        Sublayer("input_layernorm", RMSNorm(width, eps), "self_attn", _attention(sizes, rope, indexer)),
        Sublayer("post_attention_layernorm", RMSNorm(width, eps), "mlp", feed_forward),
    )


def _attention(sizes: Sizes, rope: RotaryEmbedding, indexer: Indexer | SharedIndex) -> MultiHeadLatentAttention:
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


def _indexer(sizes: Sizes, rope: RotaryEmbedding) -> Indexer:
    return Indexer(
        hidden_size=sizes.hidden_size,
        q_rank=sizes.q_rank,
        heads=sizes.index_heads,
        head_dim=sizes.index_head_dim,
        top_k=sizes.index_top_k,
        rope=rope,
    )


def _experts(sizes: Sizes) -> MixtureOfExperts:
    width, inner = sizes.hidden_size, sizes.expert_intermediate_size
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
