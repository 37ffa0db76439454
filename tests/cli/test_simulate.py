"""`prl simulate`: assumptions, sweeps and a past run, on a run made of toys and a real scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prl.cli import main

from tests.ledger.histories import arrivals, write

EXTENDS = """
extends = "toy.toml"
plugins = ["bounded_staleness"]
[rollouts]
groups_per_step = 4
group_size = 4
max_tokens = 64
[scheduler]
type = "bounded_staleness"
max_staleness = 1
"""


@pytest.fixture
def config(toy_config: Path) -> Path:
    path = toy_config.parent / "simulated.toml"
    path.write_text(EXTENDS)
    return path


def printed(capsys: pytest.CaptureFixture[str], config: Path, *arguments: str) -> Any:
    assert main(["simulate", str(config), "--steps", "20", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_without_a_sweep_bound_and_group_size_are_varied(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = printed(capsys, config)
    assert [outcome["changes"] for outcome in document["outcomes"]] == [
        {},
        {"scheduler.max_staleness": 0},
        {"scheduler.max_staleness": 2},
        {"rollouts.group_size": 2},
        {"rollouts.group_size": 8},
    ]
    assert document["assumptions"]["length_mean"] == 32.0
    assert document["assumptions"]["slots"] == 64
    now, synchronous, *_ = (outcome["figures"] for outcome in document["outcomes"])
    assert now["tokens_per_second"] > synchronous["tokens_per_second"]
    assert synchronous["staleness"] == {"0": 1.0}


def test_a_sweep_is_every_combination_but_the_config_as_it_is(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["--sweep", "scheduler.max_staleness=1,3", "rollouts.group_size=4,6"]
    document = printed(capsys, config, *sweep, "--set", "scheduler.max_staleness=3")
    assert [outcome["changes"] for outcome in document["outcomes"]] == [
        {},
        {"scheduler.max_staleness": 1},
        {"scheduler.max_staleness": 1, "rollouts.group_size": 6},
        {"rollouts.group_size": 6},
    ]
    assert document["outcomes"][0]["figures"]["groups_trained"] == 80


def test_a_path_into_a_list_may_be_swept(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = printed(capsys, config, "--sweep", "environments.0.weight=1.0,2.5")
    assert [outcome["changes"] for outcome in document["outcomes"]] == [{}, {"environments[0].weight": 2.5}]


def test_flags_are_assumptions(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--length-mean", "10", "--length-sigma", "0", "--slots", "3", "--sweep", "rollouts.group_size=4"]
    document = printed(capsys, config, *flags)
    (outcome,) = document["outcomes"]
    assert outcome["figures"]["length_trained"] == 10.0
    assert outcome["figures"]["sequences"] <= 3.0
    assert document["assumptions"]["slots"] == 3


def test_as_text(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(config), "--steps", "5"]) == 0
    text = capsys.readouterr().out
    titles = [line for line in text.splitlines() if line and not line.startswith(" ")]
    assert titles[0] == "assumed"
    assert titles[1].startswith("as configured: 5 steps in ")
    assert titles[2:] == ["settings", "what a change would buy"]
    assert "  scheduler.max_staleness 1 -> 0: tokens per second -" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--sweep", "rollouts.group_size"], "--sweep rollouts.group_size: expected section.key=value,value,..."),
        (["--sweep", "rollouts.group_size=4,,8"], "expected section.key=value,value,..."),
        (["--sweep", "rollouts.grop_size=4,8"], "did you mean 'group_size'"),
        (["--failure", "1.5"], "'failure' must be <= 1.0: 1.5"),
        (["--from", "nowhere"], "nowhere is not a run directory"),
    ],
)
def test_what_the_user_wrote_wrong_is_exit_code_2(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main(["simulate", str(config), *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_a_past_run_replaces_what_would_be_assumed(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    past = tmp_path / "past"
    past.mkdir()
    (past / "run.toml").write_text(config.read_text().replace('"toy.toml"', '"../toy.toml"'))
    rows = [
        {
            "step": step,
            "phase": "rl",
            "time/step": 2.0,
            "tokens/sampled": 320,
            "time/forward_backward": 1.25,
            "idle/trainer": 0.25,
            "idle/engine": 0.5,
            "time/publish": 0.125,
        }
        for step in range(1, 21)
    ]
    (past / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    write(past / "ledger.sqlite", arrivals([[20] * 4] * 80))

    document = printed(capsys, config, "--from", str(past), "--step-base", "0.5")
    assumptions, simulated = document["assumptions"], document["past"]["simulated"]
    assert (assumptions["step_base"], assumptions["publish"], assumptions["failure"]) == (0.5, 0.125, 0.0)
    assert assumptions["step_per_token"] == 1.25 / 320
    assert document["past"]["recorded"]["tokens_per_second"] == 160.0
    assert simulated["idle_trainer"] < 0.05  # a trainer of 1.5 s a step is what bounds the run
    assert (1 - simulated["idle_engine"]) / simulated["tokens_per_second"] == pytest.approx(0.5 / 160, rel=0.05)
    assert document["outcomes"][0]["figures"]["length_trained"] == 20.0
