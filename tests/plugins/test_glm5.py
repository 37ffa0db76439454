"""The GLM-5 family against transformers and against itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from prl.blocks import checkpoint
from prl.blocks.decoder import Decoder
from prl.compose.config import ModelConfig
from prl.errors import UserError
from prl_glm5 import Glm5Config, Glm51Config, Glm52Config, GlmConfig, prl_models
from prl_glm5.network import build
from prl_glm5.sizes import FULL, resolve
from prl_glm5.weights import weight_map
from safetensors.torch import load_file, save_file

from tests.plugins import parity
from tests.plugins.parity import VOCAB, logits, packed, some_tokens

from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM  # isort: skip (parity says to be offline)

SIZES: dict[str, GlmConfig] = {
    "toy, all tokens seen": Glm51Config(),
    "selective": Glm5Config(index_top_k=16, layers=3),
    "shared selection": Glm52Config(index_top_k=16, layers=8, experts=4),
}
every_size = pytest.mark.parametrize("config", SIZES.values(), ids=SIZES.keys())
SELECTIVE = SIZES["selective"]


def made(config: GlmConfig, seed: int = 0) -> Decoder:
    return parity.randomise(build(config, VOCAB), seed)


def oracle(folder: Path, *, published_epsilon: bool = True) -> GlmMoeDsaForCausalLM:
    """Our checkpoint in transformers, whose latent norms get the published epsilon.

    transformers builds them with its class default 1e-6, vLLM and the published code with the config's.
    """
    model: GlmMoeDsaForCausalLM
    model, report = GlmMoeDsaForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, module in model.named_modules():
        if name.endswith(("q_a_layernorm", "kv_a_layernorm")) and published_epsilon:
            assert module.variance_epsilon == 1e-6
            module.variance_epsilon = 1e-5
    return model


def saved_oracle(model: Decoder, config: GlmConfig, folder: Path, **options: Any) -> GlmMoeDsaForCausalLM:
    return oracle(parity.written(model, weight_map(config, VOCAB), folder), **options)


# --- against transformers ---------------------------------------------------------------------------------------------
@every_size
@pytest.mark.parametrize(("seed", "length"), [(0, 70), (1, 33)])
def test_logits_and_gradients_are_those_of_transformers(
    config: GlmConfig, seed: int, length: int, tmp_path: Path
) -> None:
    model = made(config, seed)
    reference = saved_oracle(model, config, tmp_path)
    parity.assert_same_logits_and_gradients(
        model, reference, dict(reference.named_parameters()), weight_map(config, VOCAB), length=length, seed=seed
    )


@pytest.mark.parametrize("length", [15, 16, 17])
def test_selection_begins_where_there_is_something_to_leave_out(length: int, tmp_path: Path) -> None:
    model = made(SELECTIVE)
    reference = saved_oracle(model, SELECTIVE, tmp_path)
    dense = made(Glm5Config(index_top_k=1000, layers=3))
    tokens = some_tokens(length)
    with torch.no_grad():
        own, theirs = logits(model, tokens, packed(length)), reference(input_ids=tokens[None]).logits[0]
        unselective = logits(dense, tokens, packed(length))
    torch.testing.assert_close(own, theirs, atol=5e-6, rtol=0)
    assert torch.equal(own, unselective) == (length <= 16)


def test_transformers_norms_its_latents_with_another_epsilon(tmp_path: Path) -> None:
    """Small latents show it: ours are those of the published epsilon."""
    model = made(SELECTIVE)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("qkv_a_proj.weight"):
                tensor.mul_(0.02)
    parity.written(model, weight_map(SELECTIVE, VOCAB), tmp_path)
    tokens = some_tokens(40)
    with torch.no_grad():
        own = logits(model, tokens, packed(40))
        corrected, as_it_is = (
            oracle(tmp_path, published_epsilon=published)(input_ids=tokens[None]).logits[0]
            for published in (True, False)
        )
    torch.testing.assert_close(own, corrected, atol=5e-6, rtol=0)
    assert (own - as_it_is).abs().max() > 0.01


# --- against itself ---------------------------------------------------------------------------------------------------
@every_size
@pytest.mark.parametrize("lengths", [(13, 13, 13), (40, 1, 7, 22), (5, 60), (30, 30)])
def test_packed_documents_are_as_if_alone(config: GlmConfig, lengths: tuple[int, ...]) -> None:
    parity.assert_packing_changes_nothing(made(config), lengths)


@every_size
def test_generation_step_by_step_equals_the_whole(config: GlmConfig) -> None:
    parity.assert_steps_equal_the_whole(made(config), copied=19)


@every_size
def test_writing_and_reading_changes_no_bit(config: GlmConfig, tmp_path: Path) -> None:
    parity.assert_round_trip(made(config), build(config, VOCAB), weight_map(config, VOCAB), tmp_path)


def test_the_indexer_is_frozen_and_nothing_else_is() -> None:
    model = build(SELECTIVE, VOCAB)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if ".indexer." in name}
    assert len(frozen) == 3 * 5


def test_the_prediction_block_is_carried(tmp_path: Path) -> None:
    config = Glm51Config(size="full", layers=2, hidden_size=8)
    names = weight_map(config, VOCAB)
    assert names.carried == ["model.layers.2."]
    assert names.hf_config()["num_nextn_predict_layers"] == 1
    toy, stored = made(SELECTIVE), weight_map(SELECTIVE, VOCAB)
    parity.written(toy, stored, tmp_path / "published")
    extra = {"model.layers.3.eh_proj.weight": torch.randn(4, 8)}
    save_file(extra, tmp_path / "published" / "prediction.safetensors")
    carrying = type(stored)(
        operations=stored.operations, prefixes=stored.prefixes, config=stored.config, carried=["model.layers.3."]
    )
    checkpoint.load(build(SELECTIVE, VOCAB), carrying, tmp_path / "published")
    parity.written(toy, carrying, tmp_path / "ours", origin=tmp_path / "published")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert torch.equal(ours["model.layers.3.eh_proj.weight"], extra["model.layers.3.eh_proj.weight"])


# --- sizes and names --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "total", "active"), [(Glm5Config, 743.9, 41.8), (Glm51Config, 743.9, 41.8), (Glm52Config, 743.4, 41.3)]
)
def test_the_published_sizes(kind: type[GlmConfig], total: float, active: float) -> None:
    """Without the block that predicts further tokens, which is no part of the network."""
    with torch.device("meta"):
        model = build(kind(size="full"), VOCAB)
    counted = parity.totals(model, FULL.experts_per_token, FULL.experts)
    assert tuple(round(billions, 1) for billions in counted) == (total, active)
    names = weight_map(kind(size="full"), VOCAB)
    assert names.carried == ["model.layers.78."]
    assert not [name for name, _ in model.named_parameters() if name.startswith("layers.78.")]


def test_layers_of_the_last_release_share_their_selection() -> None:
    with torch.device("meta"):
        model = build(Glm52Config(size="full"), VOCAB)
    own = {int(name.split(".")[1]) for name, _ in model.named_parameters() if ".indexer." in name}
    assert len(own) == 21
    assert sorted(own)[:5] == [0, 1, 2, 6, 10]
    stored = weight_map(Glm52Config(size="full"), VOCAB).hf_config()
    known = GlmMoeDsaConfig(**{key: value for key, value in stored.items() if key != "indexer_types"})
    assert known.indexer_types == stored["indexer_types"]
    assert known.rope_parameters["rope_theta"] == 8e6


def test_published_names() -> None:
    config = Glm51Config(size="full", layers=4)
    with torch.device("meta"):
        tensors = build(config, VOCAB).state_dict()
    names = weight_map(config, VOCAB)
    shapes = {hf: tuple(view.shape) for name, t in tensors.items() for hf, view in names.to_hf(name, t)}
    stem = "model.layers.3"
    assert shapes["lm_head.weight"] == (154_880, 6144)
    assert shapes["model.layers.2.mlp.up_proj.weight"] == (12_288, 6144)
    assert shapes[f"{stem}.self_attn.kv_b_proj.weight"] == (64 * 448, 512)
    assert shapes[f"{stem}.self_attn.indexer.wq_b.weight"] == (4096, 2048)
    assert shapes[f"{stem}.self_attn.indexer.k_norm.bias"] == (128,)
    assert shapes[f"{stem}.self_attn.indexer.weights_proj.weight"] == (32, 6144)
    assert shapes[f"{stem}.mlp.gate.e_score_correction_bias"] == (256,)
    assert shapes[f"{stem}.mlp.experts.255.gate_proj.weight"] == (2048, 6144)
    assert shapes[f"{stem}.mlp.shared_experts.down_proj.weight"] == (6144, 2048)


def test_the_config_says_how_to_route_and_select() -> None:
    config = weight_map(Glm51Config(size="full"), VOCAB).hf_config()
    expected = {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_router_dtype": "float32",
        "routed_scaling_factor": 2.5,
        "indexer_rope_interleave": True,
        "index_topk_freq": 1,
        "index_topk": 2048,
    }
    assert {key: config[key] for key in expected} == expected
    assert "head_dim" not in config


@pytest.mark.parametrize(
    ("config", "vocab_size", "message"),
    [
        (Glm51Config(size="full"), 200_000, "has 154880 tokens, but the tokenizer has 200000"),
        (Glm51Config(experts_per_token=9), VOCAB, r"experts_per_token must be <= 8 experts: 9"),
    ],
)
def test_impossible_sizes(config: GlmConfig, vocab_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(config, vocab_size)


def test_a_toy_is_small() -> None:
    assert sum(p.numel() for p in build(Glm51Config(), 64).parameters()) < 1_000_000


def test_the_providers() -> None:
    providers = {provider.name: provider for provider in prl_models()}
    assert list(providers) == ["glm-5", "glm-5.1", "glm-5.2"]
    for provider in providers.values():
        assert issubclass(provider.config, ModelConfig)
        assert provider.float32 == ("e_score_correction_bias",)
