"""Nemotron-3 out of shared blocks: one mixer per layer, as the pattern of the size says."""

from __future__ import annotations

from prl.blocks.attention import GroupedQueryAttention
from prl.blocks.decoder import Decoder, Layer, Sublayer, initialise
from prl.blocks.mamba2 import Mamba2, MambaSizes
from prl.blocks.mlp import SquaredReluMLP
from prl.blocks.moe import LatentMixtureOfExperts, MixtureOfExperts, SigmoidRouter, SquaredReluExperts
from prl.blocks.norm import RMSNorm
from torch import nn

from prl_nemotron3 import NemotronConfig
from prl_nemotron3.published import Sizes
from prl_nemotron3.sizes import resolve


def build(config: NemotronConfig, vocab_size: int) -> Decoder:
    """The model on the current default device, with fresh weights."""
    sizes = resolve(config, vocab_size)
    model = Decoder(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        layers=[_layer(sizes, letter) for letter in sizes.pattern],
        norm_eps=sizes.norm_eps,
        tied_embeddings=False,
    )
    initialise(model, deviation=sizes.deviation)
    return model


def _layer(sizes: Sizes, letter: str) -> Layer:
    mixers = {"M": _mamba, "*": _attention, "E": _experts}
    return Layer(Sublayer("norm", RMSNorm(sizes.hidden_size, sizes.norm_eps), "mixer", mixers[letter](sizes)))


def _mamba(sizes: Sizes) -> nn.Module:
    mamba = MambaSizes(
        heads=sizes.mamba_heads,
        head_dim=sizes.mamba_head_dim,
        groups=sizes.mamba_groups,
        state=sizes.mamba_state,
        kernel=sizes.mamba_kernel,
        chunk=sizes.mamba_chunk,
    )
    return Mamba2(mamba, hidden_size=sizes.hidden_size, norm_eps=sizes.norm_eps)


def _attention(sizes: Sizes) -> nn.Module:
    return GroupedQueryAttention(
        hidden_size=sizes.hidden_size, heads=sizes.heads, kv_heads=sizes.kv_heads, head_dim=sizes.head_dim
    )


def _experts(sizes: Sizes) -> nn.Module:
    width, latent = sizes.hidden_size, sizes.latent_size
    router = SigmoidRouter(
        hidden_size=width,
        experts=sizes.experts,
        experts_per_token=sizes.experts_per_token,
        scale=sizes.routed_scale,
    )
    experts = SquaredReluExperts(
        experts=sizes.experts, hidden_size=latent or width, intermediate_size=sizes.expert_intermediate_size
    )
    shared = SquaredReluMLP(width, sizes.shared_intermediate_size)
    if latent is None:
        return MixtureOfExperts(router, experts, shared=shared)
    return LatentMixtureOfExperts(router, experts, hidden_size=width, latent_size=latent, shared=shared)
