"""Qwen3 out of shared blocks: grouped-query attention with query-key norm, and SwiGLU layers or experts."""

from __future__ import annotations

from prl.blocks.attention import GroupedQueryAttention
from prl.blocks.decoder import Decoder, Layer, Sublayer, initialise
from prl.blocks.mlp import GatedMLP
from prl.blocks.moe import Experts, MixtureOfExperts, SoftmaxRouter
from prl.blocks.norm import RMSNorm
from prl.blocks.rope import RotaryEmbedding

from prl_qwen3 import Qwen3Config
from prl_qwen3.sizes import resolve


def build(config: Qwen3Config, vocab_size: int) -> Decoder:
    """The model on the current default device, with fresh weights."""
    sizes = resolve(config, vocab_size)
    rope = RotaryEmbedding(sizes.head_dim, sizes.rope_theta)
    model = Decoder(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        layers=[_layer(sizes, rope) for _ in range(sizes.layers)],
        norm_eps=sizes.rms_norm_eps,
        tied_embeddings=sizes.tied_embeddings,
    )
    initialise(model)
    return model


def _layer(sizes: Qwen3Config, rope: RotaryEmbedding) -> Layer:
    width, eps = sizes.hidden_size, sizes.rms_norm_eps
    return Layer(
        Sublayer("input_layernorm", RMSNorm(width, eps), "self_attn", _attention(sizes, rope)),
        Sublayer("post_attention_layernorm", RMSNorm(width, eps), "mlp", _feed_forward(sizes)),
    )


def _attention(sizes: Qwen3Config, rope: RotaryEmbedding) -> GroupedQueryAttention:
    return GroupedQueryAttention(
        hidden_size=sizes.hidden_size,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        rope=rope,
        qk_norm_eps=sizes.rms_norm_eps,
    )


def _feed_forward(sizes: Qwen3Config) -> GatedMLP | MixtureOfExperts:
    if not sizes.experts:
        return GatedMLP(sizes.hidden_size, sizes.intermediate_size)
    router = SoftmaxRouter(
        hidden_size=sizes.hidden_size,
        experts=sizes.experts,
        experts_per_token=sizes.experts_per_token,
        renormalise=sizes.norm_topk_prob,
    )
    return MixtureOfExperts(
        router,
        Experts(
            experts=sizes.experts,
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.expert_intermediate_size,
        ),
    )
