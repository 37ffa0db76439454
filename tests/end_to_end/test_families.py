"""The swap: one config, and two words of it changed, trains each of the three families; the loop replays their routes.

The three runs go on side by side. Who guesses letters is right once in 17,576 words of three.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.end_to_end.families import FAMILIES, SHORT, SPELL
from tests.end_to_end.live import Launched, Run, prl

THRESHOLD = 0.02
PATIENCE = 1500.0
"""Seconds; two idle cores take a fifteenth of it."""

each_family = pytest.mark.parametrize("model", FAMILIES)


@pytest.fixture(scope="module")
def runs(families: Mapping[str, Launched]) -> Mapping[str, Run]:
    """At their end."""
    ended = {model: run.end(PATIENCE) for model, run in families.items()}
    assert {model: code for model, (code, _) in ended.items()} == dict.fromkeys(FAMILIES, 0), ended
    return families


@each_family
def test_it_learns_to_spell(runs: Mapping[str, Run], model: str) -> None:
    run = runs[model]
    before, *_, after = [line["eval/spell_backward/accuracy"] for line in run.lines if line["phase"] == "eval"]
    assert after >= THRESHOLD, (before, after)
    losses = [line["loss/ce"] for line in run.steps if line["phase"] == "warmup"]
    assert losses[-1] < losses[0] / 2


@each_family
def test_every_token_is_routed_as_the_engine_did(runs: Mapping[str, Run], model: str) -> None:
    run = runs[model]
    steps = [line for line in run.steps if line["phase"] == "rl"]
    assert len(steps) == 3
    for line in steps:
        assert line["routes/replayed"] == 1.0
        assert line["routes/missing"] == line["routes/refused"] == 0.0
        assert line["mismatch/k3"] < 0.05
    assert list((run.dir.path / "columns").glob("*")) == []


@each_family
def test_nothing_but_the_family_is_another_one(runs: Mapping[str, Run], model: str, tmp_path: Path) -> None:
    """`prl config diff` between the run and the config with the family it ships with."""
    run = runs[model]
    base = tmp_path / "base.toml"
    shown = prl(
        "config", "show", str(SPELL), *(word for s in SHORT for word in ("--set", s)), "--plugins", "no:console"
    )
    base.write_text(shown.stdout)
    lines = prl("config", "diff", str(base), str(run.dir.config)).stdout.splitlines()
    paths = {line.split()[0] for line in lines}
    assert any(model in line for line in lines)
    assert all(path == "plugins" or path.startswith(("plugins", "model.")) for path in paths), lines
