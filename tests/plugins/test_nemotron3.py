"""The Nemotron-3 family against transformers and against itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from prl.blocks import checkpoint
from prl.blocks.decoder import Decoder
from prl.compose.config import ModelConfig
from prl.errors import CheckpointError, UserError
from prl_nemotron3 import NanoConfig, NemotronConfig, SuperConfig, UltraConfig, prl_models
from prl_nemotron3.network import build
from prl_nemotron3.sizes import FULL, resolve
from prl_nemotron3.weights import weight_map
from safetensors.torch import load_file, save_file

from tests.plugins import parity
from tests.plugins.parity import VOCAB, logits, packed, some_tokens

from transformers import NemotronHConfig, NemotronHForCausalLM  # isort: skip (parity says to be offline)

ULTRA = UltraConfig()
SIZES: dict[str, NemotronConfig] = {
    "ultra": ULTRA,
    "nano, no latent": NanoConfig(pattern="ME*"),
    "mamba alone": SuperConfig(pattern="MM", hidden_size=96),
}
every_size = pytest.mark.parametrize("config", SIZES.values(), ids=SIZES.keys())


def made(config: NemotronConfig, seed: int = 0) -> Decoder:
    return parity.randomise(build(config, VOCAB), seed)


def oracle(model: Decoder, config: NemotronConfig, folder: Path, *, smallest_step: float = 0.0) -> NemotronHForCausalLM:
    """Our checkpoint in transformers, which clamps steps to its initialisation's smallest; vLLM does not."""
    parity.written(model, weight_map(config, VOCAB), folder)
    reference: NemotronHForCausalLM
    reference, report = NemotronHForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for module in reference.modules():
        if hasattr(module, "time_step_limit"):
            assert module.time_step_limit == (0.001, float("inf"))
            module.time_step_limit = (smallest_step, float("inf"))
    return reference


def published(reference: NemotronHForCausalLM) -> dict[str, Any]:
    """Its parameters by published name."""
    renames = [
        (r"^model\.embed(dings|_tokens)\.", "backbone.embeddings."),
        (r"^model\.norm(_f)?\.", "backbone.norm_f."),
        (r"^model\.", "backbone."),
    ]
    names = {}
    for name, parameter in reference.named_parameters():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        names[name] = parameter
    return names


# --- against transformers ---------------------------------------------------------------------------------------------
@every_size
@pytest.mark.parametrize(("seed", "length"), [(0, 70), (1, 32), (2, 33)])
def test_logits_and_gradients_are_those_of_transformers(
    config: NemotronConfig, seed: int, length: int, tmp_path: Path
) -> None:
    model = made(config, seed)
    reference = oracle(model, config, tmp_path)
    names = weight_map(config, VOCAB)
    parity.assert_same_logits_and_gradients(model, reference, published(reference), names, length=length, seed=seed)


def test_transformers_clamps_small_steps(tmp_path: Path) -> None:
    """Heads with a long memory show it: ours are those of (0, inf), as in vLLM and the published code."""
    model = made(ULTRA)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("dt_bias"):
                tensor.sub_(4.0)
    clamped = oracle(model, ULTRA, tmp_path / "clamped", smallest_step=0.001)
    free = oracle(model, ULTRA, tmp_path / "free")
    tokens = some_tokens(60)
    with torch.no_grad():
        own = logits(model, tokens, packed(60))
        torch.testing.assert_close(own, free(input_ids=tokens[None]).logits[0], atol=5e-6, rtol=0)
        assert (own - clamped(input_ids=tokens[None]).logits[0]).abs().max() > 2e-5


def test_transformers_lets_packed_documents_see_each_other(tmp_path: Path) -> None:
    model = made(ULTRA)
    reference = oracle(model, ULTRA, tmp_path)
    tokens, lengths = some_tokens(32), (12, 20)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        alone = torch.cat([reference(input_ids=part[None]).logits[0] for part in tokens.split(list(lengths))])
        leaking = reference(input_ids=tokens[None], position_ids=positions, use_cache=False).logits[0]
        own = logits(model, tokens, packed(*lengths))
    torch.testing.assert_close(own, alone, atol=5e-6, rtol=0)
    assert (leaking - alone).abs().max() > 0.01


# --- against itself ---------------------------------------------------------------------------------------------------
@every_size
@pytest.mark.parametrize("lengths", [(13, 13, 13), (40, 1, 7, 22), (5, 60)])
def test_packed_documents_are_as_if_alone(config: NemotronConfig, lengths: tuple[int, ...]) -> None:
    parity.assert_packing_changes_nothing(made(config), lengths)


@every_size
def test_generation_step_by_step_equals_the_whole(config: NemotronConfig) -> None:
    parity.assert_steps_equal_the_whole(made(config), copied=23)


@every_size
def test_writing_and_reading_changes_no_bit(config: NemotronConfig, tmp_path: Path) -> None:
    parity.assert_round_trip(made(config), build(config, VOCAB), weight_map(config, VOCAB), tmp_path)


def test_caches_of_a_recurrent_layer_cannot_be_cut() -> None:
    caches = build(ULTRA, VOCAB).new_caches(rows=2, length=8)
    reusable = [None if cache is None else cache.prefix_reusable for cache in caches]
    assert reusable == [False, None, False, True, None, False, None]


# --- sizes and names --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "total", "active"), [(UltraConfig, 549.3, 56.1), (SuperConfig, 120.7, 12.8), (NanoConfig, 31.6, 3.6)]
)
def test_published_sizes(kind: type[NemotronConfig], total: float, active: float) -> None:
    with torch.device("meta"):
        model = build(kind(size="full"), VOCAB)
    sizes = FULL[kind]
    counted = parity.totals(model, sizes.experts_per_token, sizes.experts)
    assert tuple(round(billions, 1) for billions in counted) == (total, active)


def test_published_patterns() -> None:
    attention = {kind: [i for i, c in enumerate(sizes.pattern) if c == "*"] for kind, sizes in FULL.items()}
    assert attention == {
        NanoConfig: [5, 12, 19, 26, 33, 42],
        SuperConfig: [7, 16, 25, 36, 47, 58, 69, 78],
        UltraConfig: [7, 14, 23, 32, 39, 48, 57, 64, 73, 82, 89, 98],
    }
    lengths = {kind: (len(s.pattern), s.pattern.count("M"), s.pattern.count("E")) for kind, s in FULL.items()}
    assert lengths == {NanoConfig: (52, 23, 23), SuperConfig: (88, 40, 40), UltraConfig: (108, 48, 48)}


def test_published_names() -> None:
    config = UltraConfig(size="full", pattern="M*E")
    with torch.device("meta"):
        tensors = build(config, VOCAB).state_dict()
    names = weight_map(config, VOCAB)
    shapes = {hf: tuple(view.shape) for name, t in tensors.items() for hf, view in names.to_hf(name, t)}
    assert shapes["backbone.embeddings.weight"] == shapes["lm_head.weight"] == (131_072, 8192)
    assert shapes["backbone.norm_f.weight"] == (8192,)
    assert shapes["backbone.layers.0.mixer.in_proj.weight"] == (35_072, 8192)
    assert shapes["backbone.layers.0.mixer.conv1d.weight"] == (18_432, 1, 4)
    assert shapes["backbone.layers.0.mixer.A_log"] == (256,)
    assert shapes["backbone.layers.0.mixer.norm.weight"] == (16_384,)
    assert shapes["backbone.layers.1.mixer.k_proj.weight"] == (256, 8192)
    assert shapes["backbone.layers.2.mixer.gate.e_score_correction_bias"] == (512,)
    assert shapes["backbone.layers.2.mixer.experts.511.up_proj.weight"] == (5120, 2048)
    assert shapes["backbone.layers.2.mixer.fc1_latent_proj.weight"] == (2048, 8192)
    assert shapes["backbone.layers.2.mixer.shared_experts.down_proj.weight"] == (8192, 10_240)
    assert names.carried == ("mtp.",)


def test_prediction_weights_are_carried_from_checkpoint_to_checkpoint(tmp_path: Path) -> None:
    """Twice: what was written with them is read as what was published."""
    original = made(ULTRA)
    parity.written(original, weight_map(ULTRA, VOCAB), tmp_path / "0")
    described = json.loads((tmp_path / "0" / "config.json").read_text())
    (tmp_path / "0" / "config.json").write_text(json.dumps(described | {"num_nextn_predict_layers": 1}))
    prediction = {
        "mtp.layers.0.eh_proj.weight": torch.randn(128, 256),
        "mtp.layers.0.mixer.q_proj.weight": torch.randn(128, 128).bfloat16(),
        "mtp.layers.1.mixer.gate.e_score_correction_bias": torch.randn(8),
        "mtp.layers.1.mixer.experts.7.up_proj.weight": torch.randn(96, 64).bfloat16(),
    }
    save_file(prediction, tmp_path / "0" / "prediction.safetensors")
    for start, end in (("0", "1"), ("1", "2")):
        config = UltraConfig(checkpoint=str(tmp_path / start))
        names, model = weight_map(config, VOCAB), build(config, VOCAB)
        assert (names.carried, names.hf_config()["num_nextn_predict_layers"]) == (("mtp.",), 1)
        checkpoint.load(model, names, tmp_path / start)
        parity.written(model, names, tmp_path / end, origin=tmp_path / start)
        written = load_file(tmp_path / end / "model.safetensors")
        assert {name for name in written if name.startswith("mtp.")} == set(prediction)
        for name, tensor in prediction.items():
            assert written[name].dtype == tensor.dtype
            assert torch.equal(written[name], tensor)
    assert all(torch.equal(tensor, original.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"unexpected: mtp\.layers\.0\.eh_proj\.weight"):
        checkpoint.load(build(ULTRA, VOCAB), weight_map(ULTRA, VOCAB), tmp_path / "1")


def test_the_config_says_how_to_route_and_what_to_keep_exact() -> None:
    config = weight_map(UltraConfig(size="full"), VOCAB).hf_config()
    expected = {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "routed_scaling_factor": 5.0,
        "mamba_ssm_cache_dtype": "float32",
        "mlp_hidden_act": "relu2",
    }
    assert {key: config[key] for key in expected} == expected
    read = NemotronHConfig(**config)
    assert read.hybrid_override_pattern == config["hybrid_override_pattern"]
    kinds = {"M": "linear_attention", "*": "full_attention", "E": "moe"}
    assert read.layers_block_type == [kinds[letter] for letter in config["hybrid_override_pattern"]]


@pytest.mark.parametrize(
    ("config", "vocab_size", "message"),
    [
        (UltraConfig(size="full"), 200_000, "has 131072 tokens, but the tokenizer has 200000"),
        (UltraConfig(experts_per_token=9), VOCAB, r"experts_per_token must be <= 8 experts: 9"),
    ],
)
def test_impossible_sizes(config: NemotronConfig, vocab_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(config, vocab_size)


def test_an_impossible_pattern() -> None:
    with pytest.raises(ValueError, match="pattern"):
        UltraConfig(pattern="MXE")


def test_a_toy_is_small() -> None:
    assert sum(p.numel() for p in build(ULTRA, 64).parameters()) < 1_000_000


def test_the_providers() -> None:
    providers = {provider.name: provider for provider in prl_models()}
    assert list(providers) == ["nemotron-3-nano", "nemotron-3-super", "nemotron-3-ultra"]
    exact = {name for name, _ in build(ULTRA, VOCAB).state_dict().items() if ".0." in name or ".1." in name}
    for provider in providers.values():
        assert issubclass(provider.config, ModelConfig)
        assert sorted(name for name in exact if name.endswith(provider.float32)) == [
            "layers.0.mixer.A_log",
            "layers.0.mixer.D",
            "layers.0.mixer.dt_bias",
            "layers.1.mixer.gate.e_score_correction_bias",
        ]
