"""`prl weights` on toys of the families: to each format and back, what is told of a checkpoint and of two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prl.blocks import checkpoint
from prl.cli import main
from prl.cli.weights import _installed
from prl_glm5 import Glm51Config
from prl_glm5.network import build as build_glm
from prl_glm5.sizes import TOY, resolve
from prl_glm5.weights import weight_map as glm_names
from prl_kimi_k2 import KimiK27Config
from prl_kimi_k2.network import build as build_kimi
from prl_kimi_k2.weights import weight_map as kimi_names
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.plugins import parity
from tests.plugins.parity import VOCAB


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bits(first: Path, second: Path) -> bool:
    a, b = tensors(first), tensors(second)
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a
    )


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a run would leave it, in float32, with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("glm") / "fp32"
    model = parity.randomise(build_glm(Glm51Config(), VOCAB))
    checkpoint.save(model.state_dict().items(), glm_names(Glm51Config(), VOCAB), folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: experts in INT4, with vision weights."""
    folder = tmp_path_factory.mktemp("kimi")
    model = parity.randomise(build_kimi(KimiK27Config(), VOCAB))
    checkpoint.save(model.state_dict().items(), kimi_names(KimiK27Config(), VOCAB), folder / "fp32")
    vision = {"vision_tower.blocks.0.wqkv.weight": torch.randn(48, 64).bfloat16()}
    save_file(vision, folder / "fp32" / "vision.safetensors")
    assert main(["weights", "convert", str(folder / "fp32"), str(folder / "int4"), "--to", "int4_group"]) == 0
    return folder / "int4"


def convert(source: Path, target: Path, number_format: str, *options: str) -> Path:
    assert main(["weights", "convert", str(source), str(target), "--to", number_format, *options]) == 0
    return target


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    capsys.readouterr()
    code = main(["weights", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


# --- convert ----------------------------------------------------------------------------------------------------------
def test_fp8_comes_back_from_bf16_and_fp32_with_its_bits(glm: Path, tmp_path: Path) -> None:
    fp8 = convert(glm, tmp_path / "fp8", "fp8_block", "--shard-gb", "0.0003")
    assert len(list(fp8.glob("*.safetensors"))) > 1
    assert (fp8 / "tokenizer.json").read_text() == "{}"
    for between in ("bf16", "fp32"):
        plain = convert(fp8, tmp_path / between, between)
        config = json.loads((plain / "config.json").read_text())
        assert "quantization_config" not in config
        assert config["dtype"] == {"bf16": "bfloat16", "fp32": "float32"}[between]
        again = convert(plain, tmp_path / f"fp8 from {between}", "fp8_block")
        assert same_bits(fp8, again)
        assert json.loads((again / "config.json").read_text()) == json.loads((fp8 / "config.json").read_text())


def test_int4_comes_back_from_fp32_with_its_bits_and_vision_is_not_rounded(kimi: Path, tmp_path: Path) -> None:
    plain = convert(kimi, tmp_path / "fp32", "fp32")
    assert same_bits(kimi, convert(plain, tmp_path / "int4", "int4_group"))
    fp8 = tensors(convert(kimi, tmp_path / "fp8", "fp8_block"))
    vision = "vision_tower.blocks.0.wqkv.weight"
    assert torch.equal(fp8[vision], tensors(kimi)[vision])
    assert fp8["language_model.model.layers.1.mlp.experts.0.up_proj.weight"].dtype is torch.float8_e4m3fn
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"] == config["text_config"]["quantization_config"]
    assert config["quantization_config"]["quant_method"] == "fp8"
    assert "vision_tower.blocks.0.wqkv" in config["quantization_config"]["modules_to_not_convert"]


def test_the_same_format_is_copied_into_files_of_another_size(kimi: Path, tmp_path: Path) -> None:
    many = convert(kimi, tmp_path / "many", "int4_group", "--shard-gb", "0.0001")
    assert len(list(many.glob("*.safetensors"))) > 5
    assert same_bits(kimi, many)


def test_what_was_converted_is_trained_on(kimi: Path) -> None:
    """Sizes from its config.json, weights through its format."""
    provider = next(e.provider for e in _installed().entries.values() if e.provider.name == "int4_group")
    from prl_int4_group.groups import int4_group

    config = KimiK27Config(checkpoint=str(kimi))
    model = build_kimi(config, VOCAB)
    checkpoint.load(model, kimi_names(config, VOCAB), kimi, number_format=int4_group(provider.config()))
    name = "language_model.model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(model.state_dict()["layers.0.self_attn.o_proj.weight"], tensors(kimi)[name].float())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--to", "fp8_blok"], 2, "there is no number format 'fp8_blok' (did you mean 'fp8_block'?); there are bf16"),
        (["--to", "bf16", "--shard-gb", "0"], 2, "--shard-gb must be more than 0, got 0.0"),
    ],
)
def test_what_cannot_be_asked(
    arguments: list[str], code: int, message: str, glm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["weights", "convert", str(glm), str(tmp_path / "out"), *arguments]) == code
    assert message in capsys.readouterr().err


def test_sources_and_targets_that_cannot_be(glm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "convert", str(glm), str(glm), "--to", "bf16"]) == 1
    assert f"{glm} already holds weights" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "mystery"}')
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "other" / "model.safetensors")
    assert main(["weights", "convert", str(tmp_path / "other"), str(tmp_path / "out"), "--to", "fp8_block"]) == 1
    assert "no installed model plugin knows checkpoints of model_type 'mystery'" in capsys.readouterr().err
    (tmp_path / "other" / "config.json").write_text(
        '{"model_type": "qwen3", "quantization_config": {"quant_method": "x"}}'
    )
    assert main(["weights", "inspect", str(tmp_path / "other")]) == 1
    assert 'quantization_config = {"quant_method": "x"}' in capsys.readouterr().err
    assert main(["weights", "inspect", str(tmp_path / "nowhere")]) == 1
    assert "has no *.safetensors file" in capsys.readouterr().err


def test_a_truncated_file_is_named(glm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fp8 = convert(glm, tmp_path / "fp8", "fp8_block")
    content = (fp8 / "model.safetensors").read_bytes()
    (fp8 / "model.safetensors").write_bytes(content[:-1000])
    capsys.readouterr()
    assert main(["weights", "convert", str(fp8), str(tmp_path / "out"), "--to", "bf16"]) == 1
    assert f"{fp8 / 'model.safetensors'} cannot be read" in capsys.readouterr().err


# --- inspect and compare ----------------------------------------------------------------------------------------------
def test_parameters_are_counted_however_they_are_stored(
    glm: Path, kimi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_glm(Glm51Config(), VOCAB)
    total, active = parity.totals(model, TOY.experts_per_token, TOY.experts)
    buffers = sum(buffer.numel() for _, buffer in model.named_buffers())
    fp8 = convert(glm, tmp_path / "fp8", "fp8_block")
    for folder in (glm, fp8):
        code, found = shown(capsys, "inspect", folder)
        assert code == 0
        assert found["parameters"] == {
            "total": round(total * 1e9) + buffers,
            "active": round(active * 1e9) + buffers,
            "carried": {},
        }
    kinds = {kind["names"]: kind for kind in found["tensors"]}
    assert kinds["model.layers.{1-3}.mlp.experts.{0-7}.down_proj.weight"] == {
        "names": "model.layers.{1-3}.mlp.experts.{0-7}.down_proj.weight",
        "dtype": "float8_e4m3fn",
        "shape": [128, 40],
        "count": 24,
    }
    _, found = shown(capsys, "inspect", kimi)
    assert found["parameters"]["carried"] == {"vision_tower.": 48 * 64}
    assert main(["weights", "inspect", str(kimi)]) == 0
    text = capsys.readouterr().out
    assert "language_model.model.layers.{1-3}.mlp.experts.{0-7}.up_proj.weight_packed" in text
    assert "3,072 more under vision_tower." in text


def test_the_prediction_block_is_counted_apart(glm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = convert(glm, tmp_path / "copy", "fp32")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    save_file({"model.layers.4.eh_proj.weight": torch.zeros(8, 16)}, folder / "prediction.safetensors")
    assert resolve(Glm51Config(checkpoint=str(folder)), 0).prediction_layers == 1
    _, before = shown(capsys, "inspect", glm)
    _, found = shown(capsys, "inspect", folder)
    assert found["parameters"]["carried"] == {"model.layers.4.": 128}
    assert found["parameters"]["total"] == before["parameters"]["total"]


def test_two_checkpoints_by_name(glm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "compare", str(glm), str(glm)]) == 0
    assert "0 of them different" in capsys.readouterr().out
    held = tensors(glm)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((glm / "config.json").read_text())
    held["model.norm.weight"] = held["model.norm.weight"] + torch.linspace(0, 0.5, 128)
    held["lm_head.weight"] = held["lm_head.weight"][:50].clone()
    held["extra.weight"] = held.pop("model.layers.0.input_layernorm.weight")
    save_file(held, other / "model.safetensors")
    code, found = shown(capsys, "compare", glm, other)
    assert code == 1
    assert [d["name"] for d in found["different"]] == ["lm_head.weight", "model.norm.weight"]
    assert found["different"][0]["note"] == "shape [96, 128] and [50, 128]"
    assert found["different"][1]["largest"] == pytest.approx(0.5)
    assert found["only_first"] == ["model.layers.0.input_layernorm.weight"]
    assert found["only_second"] == ["extra.weight"]
    assert main(["weights", "compare", str(glm), str(other)]) == 1
    assert "only in the second: 1\n  extra.weight" in capsys.readouterr().out


def test_what_a_format_costs(glm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compared by value: e4m3 keeps three bits, so an error is at most a sixteenth."""
    code, found = shown(capsys, "compare", glm, convert(glm, tmp_path / "fp8", "fp8_block"))
    assert code == 1
    assert (found["only_first"], found["only_second"]) == ([], [])
    largest = max(tensor.abs().max() for tensor in tensors(glm).values()).item()
    assert 0 < found["different"][0]["largest"] <= largest / 16
