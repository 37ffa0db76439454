"""At staleness 0 a run is its config and its seed: killed and resumed, or forked, it ends in the same bits."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import attrs
import pytest
from prl import checkpoint_dir
from prl.run_dir import RunDir

from tests.end_to_end.live import TINY, Run, kill, launched, prl, sets, succeed
from tests.listening import needs_proc

pytestmark = needs_proc

WARMUP, EVERY, MORE_STEPS = 2, 2, 3
SYNCHRONOUS = ("scheduler.max_staleness=0", f"checkpoints.every={EVERY}", "checkpoints.keep_last=0", "trackers=[]")


@attrs.frozen
class Runs:
    """The same run three times: killed and resumed, never interrupted, and forked from one of its checkpoints."""

    killed: Run
    whole: Run
    forked: Run
    cut: int
    """Step from which the killed run was resumed."""
    steps: int
    """Last step, warm-up included."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("resume")
    config = folder / "tiny.toml"
    config.write_text(TINY)
    with launched(config, folder / "killed", "run.steps=2000", *SYNCHRONOUS) as killed:
        killed.until(lambda: len(killed.rl_steps) >= 3)
        kill(killed)
    cut = checkpoint_dir.step_of(checkpoint_dir.complete(killed.dir.checkpoints)[-1])
    last = f"run.steps={cut - WARMUP + MORE_STEPS}"
    origin = ("--from", f"{killed.dir.path}@{WARMUP + EVERY}")
    edits = (last, *SYNCHRONOUS)
    with ThreadPoolExecutor() as pool:
        resumed = pool.submit(succeed, "resume", str(killed.dir.path), *sets([last]))
        succeed("launch", str(config), *sets([f"run.dir={folder / 'whole'}", *edits]))
        resumed.result()
    succeed("launch", str(config), *origin, *sets([f"run.dir={folder / 'forked'}", *edits]))
    return Runs(
        killed=Run(dir=killed.dir),
        whole=Run(dir=RunDir(folder / "whole")),
        forked=Run(dir=RunDir(folder / "forked")),
        cut=cut,
        steps=cut + MORE_STEPS,
    )


def chains(run: Run) -> dict[int, str]:
    """Version -> the hash of its weights, of the batch that led to it and of all that came before."""
    with closing(sqlite3.connect(run.dir.ledger)) as ledger:
        return dict(ledger.execute("SELECT version, chain FROM versions WHERE void_by IS NULL").fetchall())


def trainer_part(run: Run, step: int) -> bytes:
    """Parameters and optimizer state, byte by byte."""
    return (run.dir.checkpoints / f"step-{step}" / "trainer" / "rank-0.safetensors").read_bytes()


def test_a_killed_and_resumed_run_equals_one_that_was_never_interrupted(runs: Runs) -> None:
    assert chains(runs.killed) == chains(runs.whole)
    assert list(chains(runs.whole)) == list(range(runs.steps + 1))
    assert trainer_part(runs.killed, runs.steps) == trainer_part(runs.whole, runs.steps)


def test_so_does_a_fork(runs: Runs) -> None:
    expected = chains(runs.whole)
    assert chains(runs.forked) == {version: expected[version] for version in range(WARMUP + EVERY, runs.steps + 1)}
    assert trainer_part(runs.forked, runs.steps) == trainer_part(runs.whole, runs.steps)


def test_a_fork_is_replayed_from_where_it_began(runs: Runs) -> None:
    done = prl("replay", str(runs.forked.dir.path))
    steps, published = f"steps {WARMUP + EVERY + 1} to {runs.steps}", runs.steps - WARMUP - EVERY
    assert done.stdout.splitlines()[-1] == (
        f"launch 1: {steps} replayed; batches and weights ({published} of them published) are equal, bit for bit"
    )
    assert done.returncode == 0


def test_a_damaged_shard_is_refused_by_its_rank_and_a_missing_one_before_anything_starts(runs: Runs) -> None:
    shard = runs.forked.dir.checkpoints / f"step-{runs.steps}" / "trainer" / "rank-0.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    more = ("resume", str(runs.forked.dir.path), "--set", f"run.steps={runs.steps}")
    refused = prl(*more)
    assert refused.returncode == 1
    assert f"{shard} is damaged: its checksum is" in refused.stderr
    assert "is damaged: its checksum is" in runs.forked.state["error"]
    shard.unlink()
    refused = prl(*more)
    assert refused.returncode == 1
    assert f"{shard} is missing: the checkpoint had it when it was written" in refused.stderr
    assert runs.forked.dir.attempts() == [1, 2]


def test_every_step_is_recorded_once_across_the_kill(runs: Runs) -> None:
    assert [line["step"] for line in runs.killed.steps] == list(range(1, runs.steps + 1))
    assert runs.killed.rollouts == runs.whole.rollouts
    assert runs.killed.dir.attempts() == [1, 2]
    assert (runs.killed.dir.logs(1) / "metrics.jsonl").is_file()


def test_evaluations_see_the_same_policy_across_the_kill(runs: Runs) -> None:
    def evaluations(run: Run) -> dict[int, dict[str, float]]:
        lines = [line for line in run.lines if line["phase"] == "eval"]
        assert len({line["step"] for line in lines}) == len(lines)
        return {line["step"]: {k: v for k, v in line.items() if k.startswith("eval/spell")} for line in lines}

    whole, killed = evaluations(runs.whole), evaluations(runs.killed)
    both = whole.keys() & killed.keys()  # one that is due before the last has begun is left out
    assert both
    assert {step: whole[step] for step in both} == {step: killed[step] for step in both}
