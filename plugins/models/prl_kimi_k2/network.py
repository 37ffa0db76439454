"""Kimi-K2 out of shared blocks: latent attention with yarn positions, a dense layer first, then experts."""

from __future__ import annotations

from prl.blocks.decoder import Decoder
from prl.blocks.deepseek_v3 import decoder, feed_forward, latent_attention, layer
from prl.blocks.rope import RotaryEmbedding, Yarn

from prl_kimi_k2 import KimiConfig
from prl_kimi_k2.sizes import resolve


def build(config: KimiConfig, vocab_size: int) -> Decoder:
    """The model on the current default device, with fresh weights."""
    sizes = resolve(config, vocab_size)
    yarn = Yarn(factor=sizes.yarn_factor, original_length=sizes.yarn_original_length, beta_fast=sizes.yarn_beta_fast)
    rope = RotaryEmbedding(sizes.rope_dim, sizes.rope_theta, interleaved=True, yarn=yarn)
    return decoder(
        sizes,
        [layer(sizes, latent_attention(sizes, rope), feed_forward(sizes, index)) for index in range(sizes.layers)],
    )
