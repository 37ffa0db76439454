"""A controller that is killed at any moment leaves an interrupted record, never a wrong one, and can be continued."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from prl.ledger import facts, schema
from prl.ledger.audit import audit
from prl.ledger.read import last_failure, snapshot
from prl.ledger.store import Store
from prl.run_dir import RunDir

from tests.ledger.histories import Script, eventful, write

TOLD = eventful().facts
MOMENTS = sorted(random.Random(5).sample(range(1, len(TOLD)), 16))


def checkpoint_before(moment: int) -> dict[str, Any]:
    """The cut after the newest step that was done by then, found by living the same life again."""
    script = Script()
    cuts = [script.state()]

    class Watched(list[facts.Fact]):
        def __iadd__(self, told: Any) -> Watched:
            for fact in told:
                self.append(fact)
                if isinstance(fact, facts.Trained) and len(self) <= moment:
                    cuts.append(script.state())
            return self

    script.facts = Watched()
    eventful(script)
    return cuts[-1]


def test_every_moment_of_a_history_is_a_consistent_record(tmp_path: Path) -> None:
    """Each fact is a transaction here; the file is copied between them, as a kill would leave it."""
    path = tmp_path / "ledger.sqlite"
    store, written = Store(path), 0
    for moment in MOMENTS:
        store.write([(1000.0 + i, fact) for i, fact in enumerate(TOLD[written:moment], start=written)])
        written = moment
        run_dir = RunDir(tmp_path / f"killed-{moment}")
        run_dir.path.mkdir()
        shutil.copyfile(path, run_dir.ledger)
        found = audit(run_dir)
        assert [problem for check in found.checks for problem in check.problems] == []
        assert found.launches[-1].endswith("has not ended, or was killed")
    store.close()


@pytest.mark.parametrize("moment", MOMENTS[::3])
def test_whatever_was_under_way_is_trained_after_a_resume(tmp_path: Path, moment: int) -> None:
    run_dir = RunDir(tmp_path)
    write(run_dir.ledger, TOLD[:moment])
    state = checkpoint_before(moment)
    ledger = snapshot(run_dir.ledger)
    row = ledger.execute("SELECT chain FROM versions WHERE version = ?", (state["step"],)).fetchone()
    outstanding = {issue["group_id"] for issue in state["feed"]["outstanding"]}
    script = Script().resume(state, row["chain"] if row else "")
    while script.version < 10:
        script.step() if script.version >= 2 else script.warm_up(publish=True)
    write(run_dir.ledger, script.facts, start=5000.0)
    found = audit(run_dir)
    assert [problem for check in found.checks for problem in check.problems] == []
    trained = snapshot(run_dir.ledger).execute(
        "SELECT count(DISTINCT group_id), count(*) FROM members m JOIN issues i ON i.id = m.issue JOIN batches b"
        " ON b.id = m.batch WHERE i.feed = 'rl' AND b.done_at > 0 AND b.void_by IS NULL"
    )
    assert tuple(trained.fetchone()) == (16, 16)
    still = {issue["group_id"] for issue in script.state()["feed"]["outstanding"]}
    assert not outstanding & still


def test_a_commit_that_was_cut_short_is_undone_in_a_copy(tmp_path: Path) -> None:
    """The journal is hot and the file half-written; reading changes neither, and needs no right to."""
    path = tmp_path / "live.sqlite"
    write(path, TOLD)
    run_dir = RunDir(tmp_path / "killed")
    run_dir.path.mkdir()
    connection = schema.open_for_writing(path)
    connection.execute("PRAGMA cache_size = 1")
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("UPDATE batches SET done_at = NULL")
    connection.execute("UPDATE issues SET void_by = 1, dropped = 'never'")
    connection.execute("UPDATE rollouts SET versions = printf('%500d', 1)")
    journals = (path.with_name("live.sqlite-journal"), run_dir.path / "ledger.sqlite-journal")
    shutil.copyfile(path, run_dir.ledger)
    shutil.copyfile(*journals)
    connection.execute("ROLLBACK")
    connection.close()
    before = [file.read_bytes() for file in (run_dir.ledger, journals[1])]
    assert len(before[1]) > 512
    assert before[0] != path.read_bytes()
    found = audit(run_dir)
    assert found.passed
    assert found.checks == audit_of(path, tmp_path / "whole").checks
    assert last_failure(run_dir.ledger).startswith("6.2: no such file")
    assert [file.read_bytes() for file in (run_dir.ledger, journals[1])] == before


def audit_of(path: Path, folder: Path) -> Any:
    folder.mkdir()
    shutil.copyfile(path, folder / "ledger.sqlite")
    return audit(RunDir(folder))


def test_a_ledger_is_read_while_it_is_written(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    store = Store(run_dir.ledger)
    store.write([(1000.0, fact) for fact in TOLD[:40]])
    assert audit(run_dir).passed
    store.write([(1001.0, fact) for fact in TOLD[40:]])
    assert audit(run_dir).passed
    store.close()


def test_a_controller_that_died_while_making_the_ledger_can_begin_again(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.ledger.touch()
    assert last_failure(run_dir.ledger) == ""
    write(run_dir.ledger, TOLD)
    assert audit(run_dir).passed
