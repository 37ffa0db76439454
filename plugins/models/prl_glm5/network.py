"""GLM-5 out of shared blocks: sparse latent attention, some dense layers first, then experts."""

from __future__ import annotations

from prl.blocks.decoder import Decoder
from prl.blocks.deepseek_v3 import decoder, feed_forward, latent_attention, layer
from prl.blocks.dsa import Indexer, SharedIndex
from prl.blocks.rope import RotaryEmbedding

from prl_glm5 import GlmConfig
from prl_glm5.published import Sizes
from prl_glm5.sizes import resolve


def build(config: GlmConfig, vocab_size: int) -> Decoder:
    """The model on the current default device, with fresh weights."""
    sizes = resolve(config, vocab_size)
    rope = RotaryEmbedding(sizes.rope_dim, sizes.rope_theta, interleaved=True)
    return decoder(
        sizes,
        [
            layer(sizes, latent_attention(sizes, rope, _indexer(sizes, rope, index)), feed_forward(sizes, index))
            for index in range(sizes.layers)
        ],
    )


def _indexer(sizes: Sizes, rope: RotaryEmbedding, layer: int) -> Indexer | SharedIndex:
    if not sizes.has_indexer(layer):
        return SharedIndex(sizes.index_top_k)
    return Indexer(
        hidden_size=sizes.hidden_size,
        q_rank=sizes.q_rank,
        heads=sizes.index_heads,
        head_dim=sizes.index_head_dim,
        top_k=sizes.index_top_k,
        rope=rope,
    )
