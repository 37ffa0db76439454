"""The Kimi-K2 family against transformers' DeepSeek-V3, which is its language part, and against itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prl.blocks import checkpoint
from prl.blocks.decoder import Decoder
from prl.compose.config import ModelConfig
from prl.errors import CheckpointError, UserError
from prl_kimi_k2 import KimiConfig, KimiK2Config, KimiK25Config, KimiK27Config, prl_models
from prl_kimi_k2.network import build
from prl_kimi_k2.sizes import FULL, resolve
from prl_kimi_k2.weights import weight_map
from safetensors.torch import load_file, save_file

from tests.plugins import parity
from tests.plugins.parity import VOCAB, logits, packed, some_tokens

from transformers import DeepseekV3Config, DeepseekV3ForCausalLM  # isort: skip (parity says to be offline)

SIZES: dict[str, KimiConfig] = {
    "toy": KimiK27Config(),
    "k2": KimiK2Config(layers=3),
    "wide choice": KimiK25Config(layers=2, hidden_size=96, experts=12, experts_per_token=5),
}
every_size = pytest.mark.parametrize("config", SIZES.values(), ids=SIZES.keys())


def made(config: KimiConfig, seed: int = 0) -> Decoder:
    return parity.randomise(build(config, VOCAB), seed)


def oracle(config: KimiConfig, folder: Path) -> DeepseekV3ForCausalLM:
    """Our checkpoint in transformers' language model, whose latent norms get the published epsilon.

    transformers builds them with its class default 1e-6, vLLM and the published code with the config's.
    """
    stored = json.loads((folder / "config.json").read_text())
    text = {**stored.get("text_config", stored), "model_type": "deepseek_v3"}
    bare = folder / "text"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps(text))
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("language_model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, bare / "model.safetensors", metadata={"format": "pt"})
    model: DeepseekV3ForCausalLM
    model, report = DeepseekV3ForCausalLM.from_pretrained(
        bare, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, module in model.named_modules():
        if name.endswith(("q_a_layernorm", "kv_a_layernorm")):
            assert module.variance_epsilon == 1e-6
            module.variance_epsilon = resolve(config, VOCAB).rms_norm_eps
    return model


# --- against transformers ---------------------------------------------------------------------------------------------
@every_size
@pytest.mark.parametrize(("seed", "length"), [(0, 70), (1, 33)])
def test_logits_and_gradients_are_those_of_transformers(
    config: KimiConfig, seed: int, length: int, tmp_path: Path
) -> None:
    model, names = made(config, seed), weight_map(config, VOCAB)
    reference = oracle(config, parity.written(model, names, tmp_path))
    prefix = "" if isinstance(config, KimiK2Config) else "language_model."
    expected = {prefix + name: parameter for name, parameter in reference.named_parameters()}
    parity.assert_same_logits_and_gradients(model, reference, expected, names, length=length, seed=seed)


def test_positions_beyond_pretraining_are_stretched(tmp_path: Path) -> None:
    config = SIZES["toy"]
    model = made(config)
    reference = oracle(config, parity.written(model, weight_map(config, VOCAB), tmp_path))
    tokens = some_tokens(400)
    with torch.no_grad():
        own, theirs = logits(model, tokens, packed(400)), reference(input_ids=tokens[None]).logits[0]
    torch.testing.assert_close(own, theirs, atol=5e-6, rtol=0)


def test_the_whole_model_loads_in_transformers(tmp_path: Path) -> None:
    """By the published names; the vision parts, which a toy does not have, are made up."""
    from transformers import Kimi_K25ForConditionalGeneration

    config = SIZES["toy"]
    model = made(config)
    parity.written(model, weight_map(config, VOCAB), tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    stored |= {"vision_config": vision, "projection_hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    reference, report = Kimi_K25ForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not report["unexpected_keys"]
    assert not [name for name in report["missing_keys"] if "language_model" in name or "lm_head" in name]
    tokens = some_tokens(40)
    for name, module in reference.named_modules():
        if name.endswith("_a_layernorm"):
            module.variance_epsilon = 1e-5
    with torch.no_grad():
        theirs = reference(input_ids=tokens[None]).logits[0]
        torch.testing.assert_close(logits(model, tokens, packed(40)), theirs, atol=5e-6, rtol=0)


def test_transformers_saves_broken_names_and_we_do_not(tmp_path: Path) -> None:
    """A model it has built from a config: no engine knows these names. Ours are those that were published."""
    from transformers import AutoConfig, Kimi_K25ForConditionalGeneration

    config, ours = SIZES["toy"], tmp_path / "ours"
    parity.written(made(config), weight_map(config, VOCAB), ours)
    stored = json.loads((ours / "config.json").read_text())
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    (ours / "config.json").write_text(json.dumps({**stored, "vision_config": vision, "projection_hidden_size": 64}))
    Kimi_K25ForConditionalGeneration(AutoConfig.from_pretrained(ours)).save_pretrained(tmp_path / "theirs")
    saved = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert (saved["architectures"], saved["text_config"]["model_type"]) == (
        ["Kimi_K25ForConditionalGeneration"],
        "deepseek_v3",
    )
    assert (stored["architectures"], stored["text_config"]["model_type"]) == (
        ["KimiK25ForConditionalGeneration"],
        "kimi_k2",
    )
    theirs = {name for file in (tmp_path / "theirs").glob("*.safetensors") for name in load_file(file)}
    published = "language_model.model.layers.0.self_attn.q_a_proj.weight"
    assert published in load_file(ours / "model.safetensors")
    assert published not in theirs
    assert published.replace("layers", "blocks") in theirs


# --- against itself ---------------------------------------------------------------------------------------------------
@every_size
@pytest.mark.parametrize("lengths", [(13, 13, 13), (40, 1, 7, 22), (5, 60)])
def test_packed_documents_are_as_if_alone(config: KimiConfig, lengths: tuple[int, ...]) -> None:
    parity.assert_packing_changes_nothing(made(config), lengths)


@every_size
def test_generation_step_by_step_equals_the_whole(config: KimiConfig) -> None:
    parity.assert_steps_equal_the_whole(made(config), copied=7)


@every_size
def test_writing_and_reading_changes_no_bit(config: KimiConfig, tmp_path: Path) -> None:
    parity.assert_round_trip(made(config), build(config, VOCAB), weight_map(config, VOCAB), tmp_path)


def test_vision_weights_are_carried_from_checkpoint_to_checkpoint(tmp_path: Path) -> None:
    config = SIZES["toy"]
    model, names = made(config), weight_map(config, VOCAB)
    parity.written(model, names, tmp_path / "published")
    vision = {"vision_tower.patch_embed.weight": torch.randn(3, 4), "mm_projector.pre_norm.bias": torch.randn(5)}
    save_file(vision, tmp_path / "published" / "vision.safetensors")
    loaded = build(config, VOCAB)
    checkpoint.load(loaded, names, tmp_path / "published")
    parity.written(loaded, names, tmp_path / "ours", origin=tmp_path / "published")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(ours[name], tensor) for name, tensor in vision.items())
    save_file({"other.weight": torch.zeros(1)}, tmp_path / "published" / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected: other\.weight"):
        checkpoint.load(loaded, names, tmp_path / "published")


# --- sizes and names --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [KimiK2Config, KimiK25Config, KimiK27Config])
def test_the_published_sizes(kind: type[KimiConfig]) -> None:
    """Of the language model: K2.5 and later have vision weights beside it."""
    with torch.device("meta"):
        model = build(kind(size="full"), VOCAB)
    counted = parity.totals(model, FULL.experts_per_token, FULL.experts)
    assert tuple(round(billions, 1) for billions in counted) == (1026.4, 32.9)
    assert model.head().shape == (163_840, 7168)


def test_published_names() -> None:
    config = KimiK27Config(size="full", layers=2)
    with torch.device("meta"):
        tensors = build(config, VOCAB).state_dict()
    names = weight_map(config, VOCAB)
    shapes = {hf: tuple(view.shape) for name, t in tensors.items() for hf, view in names.to_hf(name, t)}
    stem = "language_model.model.layers"
    assert shapes["language_model.lm_head.weight"] == (163_840, 7168)
    assert shapes[f"{stem}.0.mlp.gate_proj.weight"] == (18_432, 7168)
    assert shapes[f"{stem}.1.self_attn.q_a_proj.weight"] == (1536, 7168)
    assert shapes[f"{stem}.1.self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)
    assert shapes[f"{stem}.1.mlp.gate.e_score_correction_bias"] == (384,)
    assert shapes[f"{stem}.1.mlp.experts.383.down_proj.weight"] == (7168, 2048)
    assert shapes[f"{stem}.1.mlp.shared_experts.up_proj.weight"] == (2048, 7168)


def test_the_config_says_how_to_route() -> None:
    config = weight_map(KimiK27Config(size="full"), VOCAB).hf_config()
    assert config["architectures"] == ["KimiK25ForConditionalGeneration"]
    text = config["text_config"]
    routing = {key: text[key] for key in ("scoring_func", "topk_method", "moe_router_dtype", "routed_scaling_factor")}
    assert routing == {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_router_dtype": "float32",
        "routed_scaling_factor": 2.827,
    }
    assert weight_map(KimiK2Config(), VOCAB).hf_config()["architectures"] == ["DeepseekV3ForCausalLM"]
    known = DeepseekV3Config(**{k: v for k, v in text.items() if k != "model_type"})
    assert known.rope_parameters["factor"] == 64.0
    assert known.n_routed_experts == 384


@pytest.mark.parametrize(
    ("config", "vocab_size", "message"),
    [
        (KimiK27Config(size="full"), 200_000, "has 163840 tokens, but the tokenizer has 200000"),
        (KimiK27Config(experts_per_token=9), VOCAB, r"experts_per_token must be <= 8 experts: 9"),
    ],
)
def test_impossible_sizes(config: KimiConfig, vocab_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(config, vocab_size)


def test_a_toy_is_small() -> None:
    assert sum(p.numel() for p in build(KimiK27Config(), 64).parameters()) < 1_000_000


def test_the_providers() -> None:
    providers = {provider.name: provider for provider in prl_models()}
    assert list(providers) == ["kimi-k2", "kimi-k2.5", "kimi-k2.7"]
    for provider in providers.values():
        assert issubclass(provider.config, ModelConfig)
        assert provider.float32 == ("e_score_correction_bias",)
    fields: dict[str, Any] = {"thinking": False}
    assert isinstance(providers["kimi-k2.5"].config(**fields), KimiK25Config)
