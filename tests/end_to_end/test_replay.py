"""A stale run of several ranks, killed and resumed, is done again from its event log: same bits, or what differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from prl import checkpoint_dir
from prl.ledger import event_log
from prl.ledger.events import Arrived, Event
from prl.ledger.read import snapshot
from prl.replay.history import segments
from prl.run_dir import RunDir

from tests.end_to_end.live import TINY, Run, kill, launched, prl, sets, succeed
from tests.listening import needs_proc

pytestmark = needs_proc

STALE = ("scheduler.max_staleness=2", "trainer.ranks=2", "checkpoints.every=2", "evaluation.every=0", "trackers=[]")
MORE_STEPS = 3
FLIPPED_STEP = 4
"""Before the cut, so that the first launch's replay meets it."""


@pytest.fixture(scope="module")
def stale(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two launches: the first was killed after a checkpoint."""
    folder = tmp_path_factory.mktemp("replay")
    config = folder / "tiny.toml"
    config.write_text(TINY)
    with launched(config, folder / "run", "run.steps=2000", *STALE) as run:
        run.until(lambda: _cut(run.dir) >= FLIPPED_STEP)
        kill(run)
    cut = _cut(run.dir)
    succeed("resume", str(run.dir.path), *sets([f"run.steps={cut - 2 + MORE_STEPS}"]))
    return Run(dir=run.dir)


def _cut(run_dir: RunDir) -> int:
    """Step of the newest complete checkpoint, 0 without one."""
    return max(map(checkpoint_dir.step_of, checkpoint_dir.complete(run_dir.checkpoints)), default=0)


def replayed(run_dir: RunDir, *words: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report of `prl replay --json`."""
    done = prl("replay", str(run_dir.path), "--json", *words)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_batches_and_weights_are_the_same_across_the_kill(stale: Run) -> None:
    first, second = segments(stale.dir, None)
    ages = snapshot(stale.dir.ledger).execute("SELECT max(staleness_max) FROM batches WHERE void_by IS NULL")
    assert ages.fetchone()[0] > 0
    code, report = replayed(stale.dir)
    assert (code, report["equal"]) == (0, True)
    ends = [(launch["launch"], launch["trained"]) for launch in report["launches"]]
    assert ends == [(1, first.end), (2, first.end + MORE_STEPS)] == [(1, second.start), (2, second.end)]
    assert report["launches"][1]["weights"] == MORE_STEPS


def test_one_bit_of_one_log_probability_is_found_at_its_step(stale: Run, tmp_path: Path) -> None:
    shutil.copytree(stale.dir.path, tmp_path / "run", ignore=shutil.ignore_patterns("replay"))
    run_dir = RunDir(tmp_path / "run")
    step = FLIPPED_STEP
    query = "SELECT group_id FROM batches b JOIN members m ON m.batch = b.id JOIN issues i ON i.id = m.issue"
    trained = {row[0] for row in snapshot(run_dir.ledger).execute(f"{query} WHERE step = {step} AND b.launch = 1")}
    path = event_log.path_of(run_dir, 1)
    entries = [(at, _flipped(event, min(trained))) for at, event in event_log.read(path)]
    path.write_bytes(event_log.MAGIC + b"".join(event_log.record(at, event) for at, event in entries))
    code, report = replayed(run_dir)
    (launch,) = report["launches"]
    assert (code, report["equal"]) == (1, False)
    assert (launch["trained"], launch["difference"]["step"], launch["difference"]["what"]) == (3, step, "the batch")
    assert launch["difference"]["recorded"] != launch["difference"]["replayed"]
    code, report = replayed(run_dir, "--until", str(step - 1))
    assert (code, report["launches"][0]["trained"]) == (0, step - 1)


def _flipped(event: Event, group_id: int) -> Event:
    """One bit of the first rollout's last log-probability, in the attempt that was admitted."""
    if not (isinstance(event, Arrived) and event.admitted and event.group.group_id == group_id):
        return event
    first, *rest = event.group.rollouts
    logprobs = first.logprobs.copy()
    logprobs.view(np.uint8)[-4] ^= 1
    group = attrs.evolve(event.group, rollouts=(attrs.evolve(first, logprobs=logprobs), *rest))
    return attrs.evolve(event, group=group)
