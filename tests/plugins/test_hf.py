"""The plugin `hf` against the models of transformers it wraps, and in a run of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prl.blocks import checkpoint
from prl.compose.compose import compose
from prl.compose.limits import possible
from prl.errors import ConfigError, UserError
from prl_hf import HfConfig
from prl_hf.limits import limits
from prl_hf.network import TransformersModel, build
from prl_hf.weights import weight_map

from tests.plugins import parity
from tests.plugins.parity import VOCAB, logits, packed, some_tokens

from transformers import AutoConfig, AutoModelForCausalLM  # isort: skip (parity says to be offline)

ROOT = Path(__file__).parents[2]
BASE = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**BASE, "model_type": "llama", "intermediate_size": 96, "num_key_value_heads": 2},
    "gpt_neox": {**BASE, "model_type": "gpt_neox", "intermediate_size": 96, "hidden_dropout": 0.5},
    "gpt2, tied": {"model_type": "gpt2", "vocab_size": VOCAB, "n_embd": 48, "n_layer": 2, "n_head": 4},
}
every = pytest.mark.parametrize("kind", CONFIGS)


def config_of(kind: str | dict[str, Any], folder: Path) -> HfConfig:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind] if isinstance(kind, str) else kind))
    return HfConfig(checkpoint=str(folder))


@torch.no_grad()
def made(kind: str, folder: Path) -> TransformersModel:
    model = build(config_of(kind, folder), VOCAB)
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)
    return model


@every
def test_logits_and_gradients_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """Documents of a packed row, each as transformers computes it alone."""
    model = made(kind, tmp_path)
    reference = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    reference.load_state_dict(model.network.state_dict())
    lengths = (13, 1, 40, 22)
    tokens, targets = some_tokens(sum(lengths)), some_tokens(sum(lengths), 1)
    own = logits(model, tokens, packed(*lengths))
    theirs = torch.cat([reference(input_ids=part[None]).logits[0] for part in tokens.split(list(lengths))])
    torch.testing.assert_close(own, theirs, atol=5e-6, rtol=0)
    for output in (own, theirs):
        torch.nn.functional.cross_entropy(output, targets).backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.network.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=2e-6, rtol=0, msg=name)


@every
def test_packed_documents_are_as_if_alone(kind: str, tmp_path: Path) -> None:
    parity.assert_packing_changes_nothing(made(kind, tmp_path), (13, 13, 13))  # type: ignore[arg-type]
    parity.assert_packing_changes_nothing(made(kind, tmp_path), (40, 1, 7, 22))  # type: ignore[arg-type]


@every
def test_generation_step_by_step_equals_the_whole(kind: str, tmp_path: Path) -> None:
    parity.assert_steps_equal_the_whole(made(kind, tmp_path), copied=19)  # type: ignore[arg-type]


@every
def test_writing_and_reading_changes_no_bit_and_transformers_loads_it(kind: str, tmp_path: Path) -> None:
    config = config_of(kind, tmp_path / "config")
    model, names = made(kind, tmp_path / "config"), weight_map(config, VOCAB)
    parity.assert_round_trip(model, build(config, VOCAB), names, tmp_path / "saved")  # type: ignore[arg-type]
    reference, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = some_tokens(20)
    with torch.no_grad():
        theirs = reference(input_ids=tokens[None]).logits[0]
        torch.testing.assert_close(logits(model, tokens, packed(20)), theirs, atol=5e-6, rtol=0)


def test_what_is_divided_by_layers_and_stored_once(tmp_path: Path) -> None:
    model = made("gpt2, tied", tmp_path)
    assert len(model.layers) == len(model.get_submodule("layers")) == 2
    names = weight_map(HfConfig(checkpoint=str(tmp_path)), VOCAB)
    stored = [hf for name, tensor in model.state_dict().items() for hf, _ in names.to_hf(name, tensor)]
    assert "transformer.wte.weight" in stored
    assert "lm_head.weight" not in stored
    assert len(stored) == len(set(stored))
    checkpoint.save(model.state_dict().items(), names, tmp_path / "saved")


# --- what it refuses --------------------------------------------------------------------------------------------------
MISTRAL = {**CONFIGS["llama"], "model_type": "mistral", "sliding_window": 8}
MIXTRAL = {**CONFIGS["llama"], "model_type": "mixtral", "num_local_experts": 4}


@pytest.mark.parametrize(
    ("stored", "vocab_size", "message"),
    [
        ({"model_type": "mystery"}, VOCAB, r"transformers builds no model from"),
        (CONFIGS["llama"], 100, r"the model knows 96 tokens, but the tokenizer has 100"),
    ],
)
def test_configs_it_refuses(stored: dict[str, Any], vocab_size: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        build(config_of(stored, tmp_path), vocab_size)


def test_logits_that_are_no_product_are_refused(tmp_path: Path) -> None:
    model = build(config_of("llama", tmp_path), VOCAB)
    scaled = {**CONFIGS["llama"], "model_type": "granite", "logits_scaling": 4.0}
    with pytest.raises(UserError, match=r"GraniteForCausalLM does more to its logits than a product"):
        build(config_of(scaled, tmp_path / "granite"), VOCAB)
    assert model.head().shape == (VOCAB, 48)


def test_experts_that_are_stored_otherwise_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"experts of MixtralForCausalLM fused .* need a plugin of their family"):
        weight_map(config_of(MIXTRAL, tmp_path), VOCAB)


def test_a_sliding_window_trains_and_is_not_served(tmp_path: Path) -> None:
    model = build(config_of(MISTRAL, tmp_path), VOCAB)
    assert logits(model, some_tokens(30), packed(10, 20)).shape == (30, VOCAB)
    with pytest.raises(UserError, match=r"caches full attention only, and this model has a sliding window of 8"):
        model.new_caches(rows=2, length=8)


def test_nothing_but_data_can_be_spread(tmp_path: Path) -> None:
    found = limits(HfConfig(checkpoint="anywhere"), VOCAB)
    assert [possible(found, degree) for degree in ("expert", "tensor", "context")] == [[1], [1], [1]]


def test_a_folder_without_a_config_is_told_before_the_launch() -> None:
    with pytest.raises(ConfigError, match=r"model\.checkpoint: 'nowhere' is no folder with a config\.json"):
        compose(
            ROOT / "configs" / "spell_backward.toml",
            plugins="hf",
            overrides=["model.type=hf", "model.checkpoint=nowhere"],
        )
