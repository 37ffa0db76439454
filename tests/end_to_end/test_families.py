"""The swap: one config, and two words of it changed, trains each of the three families; the loop replays their routes.

The three runs go on side by side. Words have three or four letters here, so that a short supervised start teaches
something: who guesses letters is right once in a hundred thousand words.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.end_to_end.live import ROOT, Run, launched, prl

FAMILIES = {"glm-5.1": "glm5", "kimi-k2.7": "kimi_k2", "nemotron-3-ultra": "nemotron3"}
SPELL = ROOT / "configs" / "spell_backward.toml"
SHORT = (
    "environments.0.parameters.max_word_len=4",
    "warmup.steps=135",
    "run.steps=3",
    "rollouts.groups_per_step=4",
    "evaluation.tasks=256",
    "evaluation.every=1000",
    "checkpoints.huggingface=false",
    "trackers=[]",
)
THRESHOLD = 0.02
PATIENCE = 1500.0
"""Seconds; two idle cores take a fifteenth of it."""

each_family = pytest.mark.parametrize("model", FAMILIES)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Run]:
    folder = tmp_path_factory.mktemp("families")
    with ExitStack() as stack:
        begun = {
            model: stack.enter_context(
                launched(
                    SPELL, folder / model, f'model.type="{model}"', *SHORT, words=("--plugins", f"{plugin},no:console")
                )
            )
            for model, plugin in FAMILIES.items()
        }
        ended = {model: run.end(PATIENCE) for model, run in begun.items()}
    assert {model: code for model, (code, _) in ended.items()} == dict.fromkeys(FAMILIES, 0), ended
    return begun


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
