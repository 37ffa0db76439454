"""A run that follows another: launched while that still trains, it begins from what that ended with."""

from __future__ import annotations

from pathlib import Path

from prl.ledger.audit import audit
from prl.run_dir import RunDir

from tests.end_to_end.live import TINY, Run, launched, prl, sets


def test_a_run_waits_for_another_and_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    config = tmp_path / "tiny.toml"
    config.write_text(TINY)
    first, second = tmp_path / "first", tmp_path / "second"
    chain = ("--after", str(first), "--from", str(first))
    with launched(config, first, "run.steps=3") as before:
        before.until(lambda: before.dir.processes.exists())
        done = prl("launch", str(config), *chain, *sets([f"run.dir={second}", "run.steps=6"]))
        assert done.returncode == 0, done.stderr
        assert before.end()[0] == 0
    runs = [Run(dir=RunDir(first)), Run(dir=RunDir(second))]
    assert [run.state["status"] for run in runs] == ["finished"] * 2
    assert [[line["step"] for line in run.steps] for run in runs] == [[1, 2, 3, 4, 5], [6, 7, 8]]
    for run in runs:
        assert [check for check in audit(run.dir).checks if check.problems] == []
