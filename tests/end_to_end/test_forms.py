"""Whole runs of what other runs do not touch: a model of transformers; a checkpoint in INT4, trained and served so."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch
from prl.blocks import checkpoint
from prl.blocks.form import Form
from prl.cli import main
from prl.compose.config import TokenizerSection
from prl.rollout.tokenizer import load as load_tokenizer
from prl_int4_group import Int4GroupConfig
from prl_int4_group.groups import int4_group
from prl_kimi_k2 import KimiK27Config, prl_models
from prl_kimi_k2.network import build
from prl_kimi_k2.weights import weight_map
from safetensors.torch import load_file, save_file

from tests.end_to_end.live import TINY, Run, launched

STEPS = 3
LLAMA = {
    "model_type": "llama",
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def run(folder: Path, plugins: str, model: str, *edits: str) -> Run:
    """To its end, at staleness 0: what differs between trainer and engine is numbers alone."""
    before, _, rest = TINY.partition("[model]")
    config = folder / "run.toml"
    config.write_text(f"{before}plugins = {plugins}\n[model]\n{model}\n[warmup]{rest.partition('[warmup]')[2]}")
    fixed = (f"run.steps={STEPS}", "scheduler.max_staleness=0", "evaluation.every=0")
    with launched(config, folder / "run", *fixed, *edits) as live:
        code, log = live.end()
    assert code == 0, log
    return live


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("hf")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return run(folder, '["hf"]', f'type = "hf"\ncheckpoint = "{folder}"')


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy of Kimi-K2.7 as it is published: experts in INT4, vision weights beside them."""
    folder = tmp_path_factory.mktemp("published")
    table = tomllib.loads((Path(__file__).parents[2] / "configs" / "spell_backward.toml").read_text())
    provider = next(provider for provider in prl_models() if provider.name == "kimi-k2.7")
    tokenizer = load_tokenizer(TokenizerSection(**table["tokenizer"]), provider.special_tokens)
    torch.manual_seed(0)
    config, form = KimiK27Config(layers=2), Form.of_family(provider, int4_group(Int4GroupConfig()))
    model, names = build(config, tokenizer.vocab_size), weight_map(config, tokenizer.vocab_size)
    checkpoint.save(model.state_dict().items(), names, folder, form=form)
    save_file({"vision_tower.patch.weight": torch.ones(2, 3).bfloat16()}, folder / "vision.safetensors")
    return folder


@pytest.fixture(scope="module")
def kimi(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(
        tmp_path_factory.mktemp("int4"),
        '["kimi_k2", "int4_group"]',
        f'type = "kimi-k2.7"\ncheckpoint = "{published}"',
        "quantization.type=int4_group",
        f"trainer.initial_weights={published}",
    )


def fresh_mismatch(of: Run) -> list[float]:
    return [line["mismatch/k3_fresh"] for line in of.rl_steps]


def test_a_model_of_transformers_is_trained_and_served(llama: Run) -> None:
    assert len(llama.rl_steps) == STEPS
    assert max(fresh_mismatch(llama)) < 1e-9
    assert llama.steps[0]["phase"] == "warmup"
    assert llama.steps[0]["grad_norm"] > 0


def test_transformers_loads_what_was_trained(llama: Run) -> None:
    from transformers import AutoModelForCausalLM

    _, report = AutoModelForCausalLM.from_pretrained(llama.checkpoint / "huggingface", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_checkpoint_in_int4_is_trained_and_served_in_int4(kimi: Run) -> None:
    """Weights are the same on both sides; what is left is bfloat16 arithmetic and the routes it flips."""
    assert len(kimi.rl_steps) == STEPS
    assert max(fresh_mismatch(kimi)) < 1e-3, fresh_mismatch(kimi)


def test_it_leaves_in_the_form_it_came_in(kimi: Run, published: Path, tmp_path: Path) -> None:
    """The trained policy in float32, then packed again: names, types and shapes as published, vision bit for bit."""
    trained = kimi.checkpoint / "huggingface"
    assert main(["weights", "convert", str(trained), str(tmp_path / "int4"), "--to", "int4_group"]) == 0
    ours = load_file(tmp_path / "int4" / "model.safetensors")
    theirs = {name: t for file in published.glob("*.safetensors") for name, t in load_file(file).items()}
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    assert torch.equal(ours["vision_tower.patch.weight"], theirs["vision_tower.patch.weight"])
    moved = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert [name for name in moved if ".experts." in name]
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "int4", published)]
    for config in configs:
        for place in (config, config["text_config"]):
            place["quantization_config"].pop("ignore")  # names the vision weights once there are any
    assert configs[0] == configs[1]
