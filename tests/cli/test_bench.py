"""`prl bench train`: the real ranks, one and two of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prl.cli import main

CONFIG = Path(__file__).parents[2] / "configs" / "spell_backward.toml"
SMALL = [
    *("--set", "rollouts.groups_per_step=2", "--set", "rollouts.group_size=2", "--set", "rollouts.sequence_length=24"),
    *("--set", "model.layers=1", "--set", "trainer.device=cpu", "--length-sigma", "0", "--length-mean", "16"),
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_trainer_alone(ranks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, "--set", f"trainer.ranks={ranks}", "--steps", "2", "--trace", str(tmp_path), "--json"]
    assert main(["bench", "train", str(CONFIG), *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lengths"] == [16] * 4
    assert len(found["steps"]) == 2
    for step in found["steps"]:
        computing = step["time/forward_backward"] + step["time/optimizer"]
        assert next(iter(step)) == "tokens/per_second_per_device"
        tokens = step["tokens/per_second_per_device"] * computing * ranks
        assert tokens == pytest.approx(4 * 16) if ranks == 1 else tokens >= 4 * 16 * 0.999  # ranks differ by phase
        assert step["flops/per_second_per_device"] > 0
        assert step["memory/peak"] > 1e7
        assert "mfu" not in step
    traces = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    assert all(any(event.get("name", "").startswith("aten::") for event in t["traceEvents"]) for t in traces)


def test_a_trainer_that_cannot_start_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", str(CONFIG), *SMALL, "--set", "trainer.initial_weights=/nowhere"]) == 1
    assert "/nowhere has no *.safetensors file" in capsys.readouterr().err


def test_no_steps_are_no_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", str(CONFIG), "--steps", "0"]) == 2
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
