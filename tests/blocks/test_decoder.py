from __future__ import annotations

import torch
from prl.blocks.attention import GroupedQueryAttention
from prl.blocks.context import Context
from prl.blocks.decoder import Decoder, Layer, Sublayer, initialise
from prl.blocks.mlp import GatedMLP
from prl.blocks.norm import RMSNorm
from prl.blocks.rope import RotaryEmbedding


def decoder(*, layers: int = 2, width: int = 64, tied: bool = False, seed: int = 0) -> Decoder:
    rope = RotaryEmbedding(16, 10_000.0)
    made = [
        Layer(
            Sublayer("norm_a", RMSNorm(width, 1e-6), "attention", _attention(width, rope)),
            Sublayer("norm_b", RMSNorm(width, 1e-6), "mlp", GatedMLP(width, 2 * width)),
        )
        for _ in range(layers)
    ]
    model = Decoder(vocab_size=50, hidden_size=width, layers=made, norm_eps=1e-6, tied_embeddings=tied)
    torch.manual_seed(seed)
    initialise(model)
    return model


def _attention(width: int, rope: RotaryEmbedding | None) -> GroupedQueryAttention:
    return GroupedQueryAttention(hidden_size=width, heads=4, kv_heads=2, head_dim=16, rope=rope)


def test_equal_seeds_give_equal_weights() -> None:
    first, second, other = decoder(seed=3), decoder(seed=3), decoder(seed=4)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert not torch.equal(first.embed_tokens.weight, other.embed_tokens.weight)


def test_matrices_are_drawn_and_norms_are_one() -> None:
    for name, parameter in decoder().named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert 0.018 < parameter.std() < 0.022, name
            assert abs(parameter.mean()) < 0.002, name


def test_every_parameter_is_drawn_and_learns() -> None:
    model = decoder()
    tokens, context = torch.arange(30), Context.packed(torch.tensor([0, 12, 30]))
    (model.hidden(tokens, context) @ model.head().T).logsumexp(1).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_tied_embeddings_are_one_parameter() -> None:
    model = decoder(tied=True)
    assert model.head() is model.embed_tokens.weight
    assert not [name for name, _ in model.named_parameters() if "lm_head" in name]


def test_calling_the_module_is_calling_hidden() -> None:
    model, tokens, context = decoder(), torch.arange(8), Context.packed(torch.tensor([0, 8]))
    assert torch.equal(model(tokens, context), model.hidden(tokens, context))


def test_caches_follow_the_parameters() -> None:
    caches = decoder(layers=3).bfloat16().new_caches(5, 20)
    assert len(caches) == 3
    assert caches[0].k.shape == (5, 2, 20, 16)
    assert caches[0].v.dtype is torch.bfloat16


def test_a_layer_may_have_a_single_mixer_without_cache() -> None:
    layer = Layer(Sublayer("norm", RMSNorm(16, 1e-6), "mixer", GatedMLP(16, 8)))
    assert layer.new_cache(1, 1) is None


def test_without_rotary_positions_order_before_a_token_is_invisible() -> None:
    attention = _attention(64, None)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    context = Context.packed(torch.tensor([0, 6]))
    shuffled = x[torch.tensor([3, 1, 4, 0, 2, 5])]
    torch.testing.assert_close(attention(x, context, 0)[5], attention(shuffled, context, 0)[5], atol=1e-6, rtol=1e-5)
