"""Kimi-K2 out of shared blocks: latent attention with yarn positions, a dense layer first, then experts."""

from __future__ import annotations

from prl.blocks.decoder import Decoder, Layer, Sublayer, initialise
from prl.blocks.mla import LatentHeads, MultiHeadLatentAttention
from prl.blocks.mlp import GatedMLP
from prl.blocks.moe import Experts, MixtureOfExperts, SigmoidRouter
from prl.blocks.norm import RMSNorm
from prl.blocks.rope import RotaryEmbedding, Yarn

from prl_kimi_k2 import KimiConfig
from prl_kimi_k2.sizes import Sizes, resolve


def build(config: KimiConfig, vocab_size: int) -> Decoder:
    """The model on the current default device, with fresh weights."""
    sizes = resolve(config, vocab_size)
    yarn = Yarn(factor=sizes.yarn_factor, original_length=sizes.yarn_original_length, beta_fast=sizes.yarn_beta_fast)
    rope = RotaryEmbedding(sizes.rope_dim, sizes.rope_theta, interleaved=True, yarn=yarn)
    model = Decoder(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        layers=[_layer(sizes, rope, dense=index < sizes.dense_layers) for index in range(sizes.layers)],
        norm_eps=sizes.rms_norm_eps,
        tied_embeddings=False,
    )
    initialise(model, deviation=sizes.deviation)
    return model


def _layer(sizes: Sizes, rope: RotaryEmbedding, *, dense: bool) -> Layer:
    width, eps = sizes.hidden_size, sizes.rms_norm_eps
    feed_forward = GatedMLP(width, sizes.intermediate_size) if dense else _experts(sizes)
    return Layer(
        Sublayer("input_layernorm", RMSNorm(width, eps), "self_attn", _attention(sizes, rope)),
        Sublayer("post_attention_layernorm", RMSNorm(width, eps), "mlp", feed_forward),
    )


def _attention(sizes: Sizes, rope: RotaryEmbedding) -> MultiHeadLatentAttention:
    heads = LatentHeads(
        heads=sizes.heads,
        q_rank=sizes.q_rank,
        kv_rank=sizes.kv_rank,
        nope_dim=sizes.nope_dim,
        rope_dim=sizes.rope_dim,
        value_dim=sizes.value_dim,
    )
    return MultiHeadLatentAttention(heads, hidden_size=sizes.hidden_size, rope=rope, norm_eps=sizes.rms_norm_eps)


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
