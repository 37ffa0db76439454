"""`prl plan`: the three models of the shipped configs at full size, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prl.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"
FULL = {"glm5_1": 743.9e9, "kimi_k2_7": 1026.4e9, "nemotron3_ultra": 549.3e9}
"""Parameters, as models.md of the families' reports has them."""


def planned(capsys: pytest.CaptureFixture[str], name: str, *arguments: str) -> dict:
    assert main(["plan", str(CONFIGS / f"{name}.toml"), "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", FULL)
def test_the_shipped_layouts_work(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, f"{name}_swe_28xh200", "--sweep", "expert=16")
    assert plan["parameters"] == pytest.approx(FULL[name], rel=1e-4)
    assert plan["devices"] == {"trainer": 128, "engines": 96}
    assert plan["configured"]["reasons"] == []
    memory, time = plan["shown"]["memory"], plan["shown"]["time"]
    assert memory["peak"] == max(memory["phases"].values()) <= plan["budget"]
    assert sum(time["parts"].values()) == pytest.approx(time["seconds"])
    assert time["tokens_per_second_per_device"] == pytest.approx(plan["tokens"] / time["seconds"] / 128)
    assert plan["engines"]["longest_sequences"] > 0


def test_a_sweep_says_what_cannot_work_and_what_would_help(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--layout", "context=1", "expert=1", "shard=128", "--sweep", "expert=3")
    plan = planned(capsys, "nemotron3_ultra_swe_28xh200", *arguments)
    assert "GB of 140 GB" in plan["configured"]["reasons"][0]
    impossible = next(other for other in plan["others"] if other["layout"]["expert"] == 3)
    assert impossible["reasons"] == [
        "expert=3 does not divide shard x context = 128",
        "expert=3 does not divide the model's 512 experts",
    ]
    assert "memory" not in impossible


def test_parts_that_the_config_computes_again_are_planned_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Between none and all: what is kept, what is computed; experts are asked once more. At toy size, on four ranks."""
    toy = ("--plugins", "kimi_k2", "--set", "model.type=kimi-k2.7", "--set", "trainer.ranks=4", "--device", "h200")
    mesh = ("--layout", "context=2", "expert=4", "--sweep", "expert=4")
    recompute = ("--set", 'trainer.activation_checkpointing="selective"', "--set", 'trainer.recompute=["experts"]')
    ways = (("--checkpointing", "none"), recompute, ("--checkpointing", "full"))
    none, selective, full = (planned(capsys, "spell_backward", *toy, *mesh, *way)["configured"] for way in ways)
    kept = [plan["memory"]["kept"] for plan in (full, selective, none)]
    assert kept == sorted(kept)
    assert len(set(kept)) == 3
    flops = [sum(plan["time"]["flops"].values()) for plan in (none, selective, full)]
    assert flops == sorted(flops)
    assert len(set(flops)) == 3
    received = [plan["time"]["exchanged"] for plan in (none, selective, full)]
    assert received[1]["expert"] == pytest.approx(1.5 * received[0]["expert"])
    assert received[1]["expert"] == received[2]["expert"]
    assert received[1]["context"] == received[0]["context"] < received[2]["context"]


def test_text_names_the_bottleneck(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(CONFIGS / "spell_backward.toml"), "--compute", "float32"]) == 0
    text = capsys.readouterr().out
    assert "layout: as configured" in text
    assert text.count("<- the bottleneck") == 1
    assert "qwen3, 0.00B parameters" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--device", "abacus"], "--device abacus: there are rates for h200, h100"),
        (["--sweep", "pipeline=2"], "pipeline=2: expected one of replicate, shard, context, expert"),
        (["--compute", "float8"], "--compute float8: expected bfloat16 or float32"),
        (["--sampled", "2"], "rollouts: 'sampled' must be <= 1.0: 2.0"),
        (["--offload-activations"], "--offload-activations: is for activation checkpointing; add --checkpointing full"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(CONFIGS / "spell_backward.toml"), *arguments]) == 2
    assert sentence in capsys.readouterr().err
