"""The number format fp8_block: exact round trips, published names, what a trainer and an engine make of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prl.blocks import checkpoint, rounding
from prl.blocks.form import Form
from prl.errors import CheckpointError
from prl_fp8_block import Fp8BlockConfig
from prl_fp8_block.blocks import dequantize, fp8_block, quantize
from prl_glm5 import Glm51Config, prl_models
from prl_glm5.network import build
from prl_glm5.weights import weight_map
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.plugins import parity
from tests.plugins.parity import VOCAB, logits, packed, some_tokens

FORMAT = fp8_block(Fp8BlockConfig())
GLM = next(provider for provider in prl_models() if provider.name == "glm-5.1")
FORM = Form.of_family(GLM, FORMAT)
CONFIG = Glm51Config()
shapes = st.tuples(st.integers(1, 300), st.integers(1, 300))


def matrix(shape: tuple[int, ...], seed: int, *, scale: float = 1.0) -> Tensor:
    """Rows of very different size."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw) * torch.logspace(-3, 1, shape[-2])[:, None] * scale


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# --- numbers ----------------------------------------------------------------------------------------------------------
@given(shapes, st.integers(0, 2**16), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([1e-30, 1, 50]))
@settings(max_examples=40, deadline=None)
def test_what_was_restored_is_exported_with_its_bits(
    shape: tuple[int, int], seed: int, dtype: torch.dtype, scale: float
) -> None:
    codes, scales = quantize(matrix(shape, seed, scale=scale).to(dtype))
    for carrier in (torch.float32, torch.bfloat16):
        again, scales_again = quantize(dequantize(codes, scales).to(carrier))
        assert same_bits(again, codes)
        assert same_bits(scales_again, scales)


def test_published_scales_are_the_largest_of_a_block_over_448() -> None:
    weight = matrix((200, 300), 3).bfloat16()
    codes, scales = quantize(weight)
    assert codes.dtype is torch.float8_e4m3fn
    assert scales.shape == (2, 3)
    assert scales[1, 2] == weight[128:, 256:].float().abs().max() / 448
    assert codes[128:, 256:].float().abs().max() == 448
    error = (dequantize(codes, scales) - weight.float()).abs()
    assert (error <= weight.float().abs() / 16 + scales.max() * 2**-9).all()


def test_a_block_of_zeros() -> None:
    codes, scales = quantize(torch.zeros(130, 4))
    assert torch.equal(dequantize(codes, scales), torch.zeros(130, 4))
    assert torch.equal(scales, torch.ones(2, 1))


def test_stacked_matrices_are_quantized_one_by_one() -> None:
    stacked = torch.stack([matrix((150, 130), seed) for seed in range(3)])
    for one, codes, scales in zip(stacked, *quantize(stacked), strict=True):
        assert all(same_bits(a, b) for a, b in zip(quantize(one), (codes, scales), strict=True))


# --- checkpoints ------------------------------------------------------------------------------------------------------
def stored(folder: Path, seed: int = 0) -> Path:
    model = parity.randomise(build(CONFIG, VOCAB), seed)
    checkpoint.save(model.state_dict().items(), weight_map(CONFIG, VOCAB), folder, form=FORM, max_shard_bytes=300_000)
    return folder


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_which_tensors_are_quantized_and_what_the_config_says(tmp_path: Path) -> None:
    tensors = all_tensors(stored(tmp_path))
    kept = {name for name, t in tensors.items() if t.dim() == 2 and t.dtype is torch.bfloat16}
    stem = "model.layers.{}"
    assert kept == {
        "lm_head.weight",
        "model.embed_tokens.weight",
        *(f"{stem.format(i)}.mlp.gate.weight" for i in range(1, 4)),
        *(f"{stem.format(i)}.self_attn.indexer.weights_proj.weight" for i in range(4)),
    }
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype is torch.float32
    assert tensors["model.layers.0.self_attn.q_a_layernorm.weight"].dtype is torch.bfloat16
    assert tensors["model.layers.0.self_attn.indexer.wk.weight"].dtype is torch.float8_e4m3fn
    assert tensors["model.layers.2.mlp.experts.7.up_proj.weight_scale_inv"].shape == (1, 1)
    assert tensors["model.layers.0.mlp.down_proj.weight_scale_inv"].shape == (1, 2)
    config = json.loads((tmp_path / "config.json").read_text())
    declared = config["quantization_config"]
    assert (declared["quant_method"], declared["weight_block_size"]) == ("fp8", [128, 128])
    assert {f"{name}.weight" for name in declared["modules_to_not_convert"]} == kept
    assert config["dtype"] == "bfloat16"
    assert config["scoring_func"] == "sigmoid"


def test_a_model_goes_through_a_checkpoint_with_every_bit(tmp_path: Path) -> None:
    """File to model to file; the model computes what the file says."""
    first = all_tensors(stored(tmp_path / "first"))
    model = build(CONFIG, VOCAB)
    checkpoint.load(model, weight_map(CONFIG, VOCAB), tmp_path / "first", number_format=FORMAT)
    checkpoint.save(model.state_dict().items(), weight_map(CONFIG, VOCAB), tmp_path / "second", form=FORM)
    second = all_tensors(tmp_path / "second")
    assert first.keys() == second.keys()
    assert all(same_bits(first[name], second[name]) for name in first)
    shape = model.layers[0].mlp.down_proj.weight.shape
    name = "model.layers.0.mlp.down_proj.weight"
    expected = dequantize(first[name], first[f"{name}_scale_inv"])
    assert torch.equal(model.layers[0].mlp.down_proj.weight, expected)
    assert shape == expected.shape


def test_transformers_reads_it_where_blocks_are_whole(tmp_path: Path) -> None:
    """Its own decoder gives our numbers; a last block of fewer than 128 it places wrongly (192 as twice 96)."""
    pytest.importorskip("accelerate", reason="transformers reads FP8 with the package accelerate")
    from transformers import FineGrainedFP8Config, GlmMoeDsaForCausalLM

    stored(tmp_path)
    model, names = build(CONFIG, VOCAB), weight_map(CONFIG, VOCAB)
    checkpoint.load(model, names, tmp_path, number_format=FORMAT)
    reference = GlmMoeDsaForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    ).state_dict()
    own = {hf: view for name, tensor in model.state_dict().items() for hf, view in names.to_hf(name, tensor)}
    shared = {name for name in reference.keys() & own.keys() if own[name].dim() == 2}
    broken = {name for name in shared if any(size > 128 and size % 128 for size in own[name].shape)}
    assert {name.rpartition("self_attn.")[2] for name in broken} == {"q_b_proj.weight", "o_proj.weight"}
    for name in shared - broken:
        assert torch.equal(own[name], reference[name]), name
    name = "model.layers.1.mlp.experts.{}.down_proj.weight"
    stacked = torch.stack([own[name.format(expert)] for expert in range(8)])
    assert torch.equal(stacked, reference["model.layers.1.mlp.experts.down_proj"])


def test_a_run_in_another_format_refuses_it(tmp_path: Path) -> None:
    stored(tmp_path)
    with pytest.raises(CheckpointError, match=r"are quantised .*\"quant_method\": \"fp8\".*set quantization\.type"):
        checkpoint.load(build(CONFIG, VOCAB), weight_map(CONFIG, VOCAB), tmp_path)


NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{NAME}_scale_inv": None}, rf"{NAME} is float8, but there is no {NAME}_scale_inv"),
        ({f"{NAME}_scale_inv": torch.ones(2, 2)}, r"\[2, 2\], but a matrix of \[128, 256\] has \[1, 2\] blocks"),
        ({f"{NAME}_scale_inv": torch.tensor([[1.0, -1.0]])}, "no positive numbers"),
        ({NAME: torch.zeros(128, 256)}, r"has a scale per block, but is torch\.float32"),
    ],
)
def test_malformed_tensors_are_named(changes: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    stored(tmp_path)
    files = {file: load_file(file) for file in tmp_path.glob("*.safetensors")}
    (tmp_path / "model.safetensors.index.json").unlink()
    for file, tensors in files.items():
        if known := changes.keys() & tensors.keys():
            edited = {**tensors, **{name: changes[name] for name in known}}
            save_file({name: tensor for name, tensor in edited.items() if tensor is not None}, file)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(build(CONFIG, VOCAB), weight_map(CONFIG, VOCAB), tmp_path, number_format=FORMAT)


# --- trainer and engine -----------------------------------------------------------------------------------------------
def test_the_trainer_computes_with_the_engines_weights() -> None:
    """Fused matrices are rounded in the parts they are published in; the gradient is that of the rounded weights."""
    names = weight_map(CONFIG, VOCAB)
    trainer, engine = (parity.randomise(build(CONFIG, VOCAB)) for _ in range(2))
    rounded = rounding.install(trainer, names, FORMAT, unquantized=GLM.unquantized)
    assert "layers.0.self_attn.qkv_a_proj.weight" in rounded
    assert "layers.1.mlp.experts.gate_up_proj" in rounded
    assert not [name for name in rounded if "lm_head" in name or "weights_proj" in name]
    received = {
        name: tensor
        for own, whole in trainer.state_dict().items()
        for hf, view in names.to_hf(own, whole)
        for name, tensor in FORM.apply(hf, view)
    }
    restored = FORMAT.restore(received)
    with torch.no_grad():
        for name, tensor in engine.state_dict().items():
            exact = name.endswith(GLM.float32) or name not in rounded
            tensor.copy_(trainer.state_dict()[name] if exact else names.from_hf(restored, name).bfloat16())
    tokens, targets = some_tokens(33), some_tokens(33, 1)
    outputs = [logits(model, tokens, packed(33)) for model in (trainer, engine)]
    assert torch.equal(*outputs)
    for output in outputs:
        torch.nn.functional.cross_entropy(output, targets).backward()
    for (name, a), (_, b) in zip(trainer.named_parameters(), engine.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == (not a.requires_grad), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name


def test_formats_it_reads() -> None:
    assert FORMAT.reads(None)
    assert FORMAT.reads(FORMAT.declaration([]))
    assert not FORMAT.reads({"quant_method": "fp8", "weight_block_size": [64, 64]})
    assert not FORMAT.reads({"quant_method": "compressed-tensors", "format": "pack-quantized"})
