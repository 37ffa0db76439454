"""What operations of attention cost, from the seconds of steps."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from prl.cli import main
from prl.compose.compose import compose
from prl.errors import RunError
from prl.plan import calibrate, trial
from prl.plan.calibrate import fit
from prl.plan.trial import Trial
from prl.rollout.tokenizer import vocab_size_of
from prl.train.survey import as_trained

CONFIG = Path(__file__).parents[2] / "configs" / "spell_backward.toml"
LONG = ["trainer.micro_batch_tokens=1024", "rollouts.sequence_length=1024", "trainer.ranks=2", "trainer.context=2"]


def rows(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    """(attention, index) beside 8e12 products."""
    return [{"products": 8e12, "attention": attention, "index": index} for attention, index in pairs]


def test_attention_that_takes_two_and_a_half_times_as_long_is_found() -> None:
    operations = rows((1e11, 0), (4e11, 0), (1.6e12, 0), (6.4e12, 0))
    seconds = [(row["products"] + 2.5 * row["attention"]) / 500e12 for row in operations]
    assert fit(operations, seconds).attention == pytest.approx(2.5, abs=1e-3)
    assert fit(operations, seconds).index == 1.0  # of which there is none


def test_attention_and_index_are_told_apart_where_one_stops_growing() -> None:
    operations = rows((1e12, 0.0), (2e12, 1e12), (2.5e12, 4e12), (2.7e12, 9e12))
    seconds = [(row["products"] + 2.0 * row["attention"] + 0.7 * row["index"]) / 500e12 for row in operations]
    found = fit(operations, seconds)
    assert (found.attention, found.index) == pytest.approx((2.0, 0.7), abs=1e-3)


def test_a_time_that_shrinks_as_attention_grows_measures_nothing() -> None:
    operations = rows((1e11, 0), (1e12, 0), (4e12, 0))
    with pytest.raises(RunError, match="measure with longer sequences"):
        fit(operations, [0.03, 0.02, 0.01])


def test_steps_are_full_micro_batches_of_documents_that_are_alike() -> None:
    run = compose(CONFIG, overrides=LONG, probe=False).run
    every = calibrate.steps(run)
    assert [step[0] for step in every] == [n for n in (1024, 512, 256, 128, 64, 32) for _ in range(calibrate.REPEATS)]
    assert all(sum(step) == 2048 and len(set(step)) == 1 for step in every)  # two ranks share each


def test_what_was_measured_becomes_a_file_that_a_config_extends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trainer stands in whose attention takes three times as long as products do."""

    def timed(given: Trial) -> list[dict[str, float]]:
        surveyed = as_trained(given.composition, vocab_size_of(given.composition))
        found = []
        for number, lengths in enumerate(given.steps):
            work = calibrate.operations(surveyed, tuple(lengths), given.sampled)
            slow = 1.0 + 0.1 * (number % calibrate.REPEATS)
            found.append({"time/forward_backward": slow * (work["products"] + 3 * work["attention"]) / 1e9})
        return [{**step, "time/optimizer": 0.0} for step in found]

    monkeypatch.setattr(trial, "run", timed)
    edits = [word for edit in LONG for word in ("--set", edit)]
    assert main(["bench", "train", str(CONFIG), *edits, "--calibrate", str(tmp_path / "costs.toml")]) == 0
    assert tomllib.loads((tmp_path / "costs.toml").read_text()) == {
        "trainer": {"costs": {"attention": 3.0, "index": 1.0}}
    }
    (tmp_path / "mine.toml").write_text(f'extends = ["{CONFIG}", "costs.toml"]\n')
    assert compose(tmp_path / "mine.toml", probe=False).run.trainer.costs.attention == 3.0
