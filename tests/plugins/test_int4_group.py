"""The number format int4_group: exact round trips, the layout of compressed-tensors, what a trainer makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prl.blocks import checkpoint, rounding
from prl.blocks.form import Form
from prl.errors import CheckpointError, UserError
from prl_int4_group import Int4GroupConfig
from prl_int4_group.groups import dequantize, int4_group, pack, quantize, unpack
from prl_kimi_k2 import KimiK2Config, KimiK27Config, prl_models
from prl_kimi_k2.network import build
from prl_kimi_k2.weights import weight_map
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.plugins import parity
from tests.plugins.parity import VOCAB, logits, packed, some_tokens

FORMAT = int4_group(Int4GroupConfig())
KIMI = next(provider for provider in prl_models() if provider.name == "kimi-k2.7")
FORM = Form.of_family(KIMI, FORMAT)
CONFIG = KimiK27Config()
NAME = "language_model.model.layers.1.mlp.experts.3.up_proj.weight"


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# --- numbers ----------------------------------------------------------------------------------------------------------
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**16), st.sampled_from([1e-30, 1.0, 1e10]))
@settings(max_examples=40, deadline=None)
def test_what_was_restored_is_exported_with_its_bits(rows: int, groups: int, seed: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 32 * groups, generator=draw) * torch.rand(rows, 1, generator=draw) * scale
    first = dict(FORMAT.export(NAME, weight))
    (name, restored), *rest = FORMAT.restore(first).items()
    assert (name, rest) == (NAME, [])
    again = dict(FORMAT.export(NAME, restored))
    assert list(first) == [f"{NAME}_packed", f"{NAME}_scale", f"{NAME}_shape"]
    assert all(same_bits(first[part], again[part]) for part in first)
    assert torch.equal(restored, FORMAT.rounded(weight))


@given(st.lists(st.integers(-8, 7), min_size=16, max_size=16))
def test_unpacking_reverses_packing(numbers: list[int]) -> None:
    matrix = torch.tensor(numbers).view(2, 8)
    assert torch.equal(unpack(pack(matrix)), matrix)


def test_the_layout_and_the_grid() -> None:
    """The first of eight in the lowest bits, stored plus 8; the largest of a group is 7."""
    assert pack(torch.tensor([[-8, -7, 0, 1, 2, 3, 7, -1]])).item() & 0xFFFFFFFF == 0x7FBA9810
    weight = torch.linspace(-3.5, 2.0, 32)[None]
    numbers, scales = quantize(weight)
    assert scales.item() == 0.5
    assert numbers.min() == -7
    assert torch.equal(numbers[0], (weight[0] * 2).round().int())
    assert scales.dtype is torch.bfloat16


def test_a_group_of_zeros() -> None:
    numbers, scales = quantize(torch.zeros(2, 32))
    assert torch.equal(dequantize(numbers, scales), torch.zeros(2, 32))
    assert torch.equal(scales, torch.ones(2, 1, dtype=torch.bfloat16))


def test_compressed_tensors_packs_and_unpacks_alike() -> None:
    """Its own functions, where the package is installed."""
    theirs = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    numbers, _ = quantize(torch.randn(6, 96, generator=torch.Generator().manual_seed(0)))
    words = theirs.pack_to_int32(numbers.to(torch.int8), 4)
    assert same_bits(words, pack(numbers))
    assert torch.equal(theirs.unpack_from_int32(words, 4, torch.Size((6, 96))).int(), unpack(words))


# --- checkpoints ------------------------------------------------------------------------------------------------------
def stored(folder: Path, config: KimiK27Config = CONFIG) -> Path:
    model = parity.randomise(build(config, VOCAB))
    checkpoint.save(model.state_dict().items(), weight_map(config, VOCAB), folder, form=FORM, max_shard_bytes=300_000)
    return folder


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_routed_experts_are_packed_and_the_config_says_so(tmp_path: Path) -> None:
    tensors = all_tensors(stored(tmp_path))
    packed_names = {name.removesuffix("_packed") for name in tensors if name.endswith("_packed")}
    assert len(packed_names) == 3 * 8 * 3
    assert all(".experts." in name for name in packed_names)
    assert tensors[f"{NAME}_packed"].shape == (64, 16)
    assert (tensors[f"{NAME}_scale"].dtype, tensors[f"{NAME}_scale"].shape) == (torch.bfloat16, (64, 4))
    assert (tensors[f"{NAME}_shape"].dtype, tensors[f"{NAME}_shape"].tolist()) == (torch.int64, [64, 128])
    config = json.loads((tmp_path / "config.json").read_text())
    declared = config["quantization_config"]
    assert config["text_config"]["quantization_config"] == declared
    assert (declared["quant_method"], declared["format"]) == ("compressed-tensors", "pack-quantized")
    assert declared["config_groups"]["group_0"]["weights"]["group_size"] == 32
    modules = {name.removesuffix(".weight") for name, t in tensors.items() if t.dim() == 2 and name.endswith(".weight")}
    modules |= {name.removesuffix(".weight") for name in packed_names}
    patterns = [pattern.removeprefix("re:") for pattern in declared["ignore"]]
    ignored = {module for module in modules if any(re.match(pattern, module) for pattern in patterns)}
    assert modules - ignored == {name.removesuffix(".weight") for name in packed_names}


def test_a_model_goes_through_a_checkpoint_with_every_bit(tmp_path: Path) -> None:
    first = all_tensors(stored(tmp_path / "first"))
    model = build(CONFIG, VOCAB)
    checkpoint.load(model, weight_map(CONFIG, VOCAB), tmp_path / "first", number_format=FORMAT)
    checkpoint.save(model.state_dict().items(), weight_map(CONFIG, VOCAB), tmp_path / "second", form=FORM)
    second = all_tensors(tmp_path / "second")
    assert first.keys() == second.keys()
    assert all(same_bits(first[name], second[name]) for name in first)
    published = json.loads((tmp_path / "first" / "config.json").read_text())
    assert json.loads((tmp_path / "second" / "config.json").read_text()) == published


def test_carried_weights_keep_their_bits_in_the_same_form_and_are_decoded_for_another(tmp_path: Path) -> None:
    """Vision parts are bfloat16; a packed carried matrix is made up."""
    stored(tmp_path / "published")
    extra = dict(FORMAT.export("vision_tower.experts.0.weight", torch.randn(4, 32)))
    extra["mm_projector.weight"] = torch.randn(3, 4).bfloat16()
    save_file(extra, tmp_path / "published" / "vision.safetensors")
    (tmp_path / "published" / "model.safetensors.index.json").unlink()
    model, names, origin = build(CONFIG, VOCAB), weight_map(CONFIG, VOCAB), tmp_path / "published"
    checkpoint.load(model, names, origin, number_format=FORMAT)
    state = model.state_dict()
    checkpoint.save(state.items(), names, tmp_path / "same", form=FORM, origin=origin)
    checkpoint.save(state.items(), names, tmp_path / "plain", origin=origin, origin_format=FORMAT)
    same, plain = all_tensors(tmp_path / "same"), all_tensors(tmp_path / "plain")
    assert all(same_bits(same[name], tensor) for name, tensor in extra.items())
    assert torch.equal(plain["vision_tower.experts.0.weight"], FORMAT.restore(extra)["vision_tower.experts.0.weight"])
    assert same_bits(plain["mm_projector.weight"], extra["mm_projector.weight"])
    assert "vision_tower.experts.0.weight_packed" not in plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{NAME}_scale": None}, rf"{NAME} is packed, but there is no {NAME}_scale"),
        ({f"{NAME}_shape": None}, rf"{NAME} is packed, but there is no {NAME}_shape"),
        ({f"{NAME}_scale": torch.ones(64, 8)}, r"\[64, 8\], but a matrix of \[64, 128\] has \[64, 4\] groups of 32"),
        ({f"{NAME}_scale": torch.full((64, 4), float("nan"))}, "no positive numbers"),
        ({f"{NAME}_shape": torch.tensor([64, 96])}, r"says \[64, 96\], but .*_packed holds \[64, 128\]"),
        ({f"{NAME}_packed": torch.zeros(64, 16)}, r"_packed is torch\.float32 \[64, 16\]: expected an int32 matrix"),
    ],
)
def test_malformed_tensors_are_named(changes: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    stored(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        if known := changes.keys() & tensors.keys():
            edited = {**tensors, **{name: changes[name] for name in known}}
            save_file({name: tensor for name, tensor in edited.items() if tensor is not None}, file)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(build(CONFIG, VOCAB), weight_map(CONFIG, VOCAB), tmp_path, number_format=FORMAT)


def test_experts_whose_rows_are_no_whole_groups() -> None:
    config = KimiK2Config(expert_intermediate_size=40)
    with pytest.raises(UserError, match=r"experts\.0\.down_proj\.weight has rows of 40: choose widths of experts"):
        rounding.install(build(config, VOCAB), weight_map(config, VOCAB), FORMAT)


def test_formats_it_reads() -> None:
    assert FORMAT.reads(None)
    declared = FORMAT.declaration(["lm_head.weight"])
    assert declared is not None
    assert FORMAT.reads(declared)
    wide = json.loads(json.dumps(declared).replace('"group_size": 32', '"group_size": 128'))
    assert not FORMAT.reads(wide)
    assert not FORMAT.reads({"quant_method": "fp8"})


# --- trainer and engine -----------------------------------------------------------------------------------------------
def engine_of(trainer: torch.nn.Module) -> torch.nn.Module:
    """What an engine holds of a trainer's weights, computing in float32."""
    names, engine = weight_map(CONFIG, VOCAB), build(CONFIG, VOCAB)
    received = {
        name: tensor
        for own, whole in trainer.state_dict().items()
        for hf, view in names.to_hf(own, whole)
        for name, tensor in FORM.apply(hf, view)
    }
    restored = FORMAT.restore(received)
    with torch.no_grad():
        for name, tensor in engine.state_dict().items():
            exact = name.endswith(KIMI.float32)
            tensor.copy_(names.from_hf(restored, name) if exact else names.from_hf(restored, name).bfloat16())
    return engine


def test_experts_compute_with_the_engines_weights_and_learn_through_their_own() -> None:
    trainer = parity.randomise(build(CONFIG, VOCAB))
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.copy_(parameter.bfloat16())  # what is not quantised travels in bfloat16 without loss then
    engine = engine_of(trainer)
    tokens = some_tokens(40)
    unrounded, served = (logits(model, tokens, packed(40)) for model in (trainer, engine))
    rounded = rounding.install(trainer, weight_map(CONFIG, VOCAB), FORMAT, unquantized=KIMI.unquantized)
    assert rounded == [
        f"layers.{layer}.mlp.experts.{part}" for layer in (1, 2, 3) for part in ("gate_up_proj", "down_proj")
    ]
    output = logits(trainer, tokens, packed(40))
    assert torch.equal(output, served)
    assert (unrounded - served).abs().max() > 0.01
    torch.nn.functional.cross_entropy(output, some_tokens(40, 1)).backward()
    torch.nn.functional.cross_entropy(served, some_tokens(40, 1)).backward()
    for (name, a), (_, b) in zip(trainer.named_parameters(), engine.named_parameters(), strict=True):
        assert a.grad is not None, name
        assert b.grad is not None, name
        assert torch.equal(a.grad, b.grad), name
