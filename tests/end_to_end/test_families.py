"""The swap: one config, and two words of it changed, trains each of the three families; the loop replays their routes.

Words have three letters here, so that a short supervised start teaches something: a policy that guesses letters is right
once in ten thousand words.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.live import ROOT, Run, launched, prl

FAMILIES = {"glm-5.1": "glm5", "kimi-k2.7": "kimi_k2", "nemotron-3-ultra": "nemotron3"}
SPELL = ROOT / "configs" / "spell_backward.toml"
SHORT = (
    "environments.0.parameters.max_word_len=3",
    "warmup.steps=70",
    "warmup.samples_per_step=32",
    "warmup.learning_rate=0.002",
    "run.steps=4",
    "rollouts.groups_per_step=4",
    "evaluation.tasks=64",
    "evaluation.every=1000",
    "checkpoints.huggingface=false",
    "trackers=[]",
)
THRESHOLD = 0.1


@pytest.fixture(scope="module", params=FAMILIES)
def learned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Run]:
    model: str = request.param
    folder = tmp_path_factory.mktemp(model)
    plugins = ("--plugins", f"{FAMILIES[model]},no:console")
    with launched(SPELL, folder / "run", f'model.type="{model}"', *SHORT, words=plugins) as run:
        code, output = run.end(patience=900.0)
    assert code == 0, output
    return model, run


def test_it_learns_to_spell(learned: tuple[str, Run]) -> None:
    _, run = learned
    before, *_, after = [line["eval/spell_backward/accuracy"] for line in run.lines if line["phase"] == "eval"]
    assert after >= THRESHOLD, (before, after)
    losses = [line["loss/ce"] for line in run.steps if line["phase"] == "warmup"]
    assert losses[-1] < losses[0] / 2


def test_every_token_is_routed_as_the_engine_did(learned: tuple[str, Run]) -> None:
    _, run = learned
    steps = [line for line in run.steps if line["phase"] == "rl"]
    assert len(steps) == 4
    for line in steps:
        assert line["routes/replayed"] == 1.0
        assert line["routes/missing"] == line["routes/refused"] == 0.0
        assert line["mismatch/k3_fresh" if "mismatch/k3_fresh" in line else "mismatch/k3"] < 0.05
    assert list((run.dir.path / "columns").glob("*")) == []


def test_nothing_but_the_family_is_another_one(learned: tuple[str, Run], tmp_path: Path) -> None:
    """`prl config diff` between the run and the config with the family it ships with."""
    model, run = learned
    base = tmp_path / "base.toml"
    shown = prl("config", "show", str(SPELL), *(word for s in SHORT for word in ("--set", s)), "--plugins", "no:console")
    base.write_text(shown.stdout)
    lines = prl("config", "diff", str(base), str(run.dir.config)).stdout.splitlines()
    paths = {line.split()[0] for line in lines}
    assert any(model in line for line in lines)
    assert all(path == "plugins" or path.startswith(("plugins", "model.")) for path in paths), lines
