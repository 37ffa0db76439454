"""Odd failures of real runs: damaged weights, a full disk, a worker that returns garbage, a clock that jumps."""

from __future__ import annotations

import resource
import sqlite3
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import attrs
import pytest
from prl.run_dir import RunDir
from prl.supervise.casualties import Reader

from tests.end_to_end.live import TINY, Run, installed, launched, prl
from tests.listening import needs_proc

pytestmark = needs_proc

TORN = """
    import os
    from pathlib import Path

    import attrs
    from prl import hookimpl
    from prl.compose.config import WeightTransportConfig
    from prl.providers import WeightTransport

    @attrs.frozen(kw_only=True)
    class TornConfig(WeightTransportConfig):
        version: int = 5

    @hookimpl
    def prl_weight_transports():
        return [
            WeightTransport(
                name="torn", config=TornConfig, summary="disk", send="prl_torn:send", receive="prl_torn:receive"
            )
        ]

    def send(config, run_dir, rank):
        from prl_disk.files import DiskSender

        class TornSender(DiskSender):
            def send(self, version, tensors):
                manifest = super().send(version, tensors)
                once = run_dir / "torn"
                if version == config.version and not once.exists():
                    once.touch()
                    with open(manifest.parts[0].location, "r+b") as file:
                        file.seek(-1, os.SEEK_END)
                        last = file.read(1)[0]
                        file.seek(-1, os.SEEK_END)
                        file.write(bytes([last ^ 1]))
                return manifest

        return TornSender(run_dir / "weights", rank)

    def receive(config, run_dir):
        from prl_disk.files import DiskReceiver

        return DiskReceiver(run_dir / "weights")
"""
"""A transport through files that flips one bit of one version, the first time it is written."""
JUMPS = """
    import itertools, time
    real, count = time.time, itertools.count()
    time.time = lambda: real() + 86400 * (next(count) % 3 - 1)
"""
"""sitecustomize.py: the wall clock of every process of the run leaps by a day or two whenever it is read."""
STUCK = """
    import threading
    from prl import hookimpl

    run_dir = None

    @hookimpl
    def prl_run_start(info):
        global run_dir
        run_dir = info.run_dir

    @hookimpl
    def prl_step_end(step):
        once = run_dir / "stuck"
        if step == 5 and not once.exists():
            once.touch()
            threading.Event().wait()
"""
"""A plugin that blocks the controller's event loop after step 5, once; the process's other threads go on."""
BIGGER = (
    "model.hidden_size=128",
    "model.intermediate_size=256",
    "model.layers=2",
    "model.head_dim=64",
    "rollouts.keep=false",
    "evaluation.every=0",
)
LIMIT = 2_500_000  # bytes of a file: more than the weights, less than the weights and the optimizer's state
NAN = "def reward(completion: str) -> float:\n    return float('nan')\n"


@attrs.frozen
class Ended(Run):
    """A run that is over."""

    code: int
    status: str
    """What `prl status` says."""

    def failures(self) -> list[tuple[str, str]]:
        with closing(sqlite3.connect(self.dir.ledger)) as ledger:
            return ledger.execute("SELECT who, sentence FROM failures ORDER BY rowid").fetchall()

    def passes_audit(self) -> bool:
        return prl("audit", str(self.dir.path)).returncode == 0


def to_the_end(folder: Path, *edits: str, plugins: str = "", words: tuple[str, ...] = (), **env: str) -> Ended:
    config = folder / "run.toml"
    config.write_text(TINY.replace("extends", f"plugins = [{plugins}]\nextends"))
    with launched(config, folder / "run", "trackers=[]", *edits, words=words, env=env) as run:
        code, _ = run.end()
    return Ended(dir=run.dir, code=code, status=prl("status", str(run.dir.path)).stdout)


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """What is started meanwhile can write no larger file: as on a disk that is full, `write` fails half way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- damaged weights --------------------------------------------------------------------------------------------------
def test_damaged_weights_are_never_served_and_are_made_again(tmp_path: Path) -> None:
    """At staleness 0 nothing goes on without version 5: the run goes back to its last cut, and writes it again."""
    run = to_the_end(
        tmp_path,
        *("scheduler.max_staleness=0", "run.steps=6", "checkpoints.every=2", 'weights={type="torn"}'),
        plugins='"torn"',
        PYTHONPATH=str(installed(tmp_path, "torn", TORN)),
    )
    assert run.code == 0
    assert (run.state["status"], run.state["step"]) == ("finished", 8)
    assert run.dir.attempts() == [1, 2]
    damaged = [sentence for who, sentence in run.failures() if who == "engine 0" and "version 5" in sentence]
    assert damaged
    assert all("checksum" in sentence for sentence in damaged)
    assert {rollout["step"]: set(rollout["versions"]) for rollout in run.rollouts}[6] == {5}
    assert run.passes_audit()


# --- a loop that hangs ------------------------------------------------------------------------------------------------
def test_a_controller_whose_event_loop_hangs_is_killed_and_the_run_goes_on(tmp_path: Path) -> None:
    run = to_the_end(
        tmp_path,
        *("run.steps=6", "checkpoints.every=2", "failures.silence=10"),
        plugins='"stuck"',
        PYTHONPATH=str(installed(tmp_path, "stuck", STUCK)),
    )
    assert run.code == 0
    assert (run.state["status"], run.state["step"]) == ("finished", 8)
    (death,) = [casualty for casualty in Reader(run.dir).read() if casualty.role == "controller"]
    assert death.sentence == "controller-0 was killed: controller-loop gave no sign of life for 10 s"
    assert death.done.startswith("attempt 2 goes on from step ")
    assert [line["step"] for line in run.steps] == list(range(1, 9))
    assert run.passes_audit()


# --- a full disk ------------------------------------------------------------------------------------------------------
def test_a_full_disk_during_a_checkpoint_ends_the_run_which_goes_on_when_there_is_room(tmp_path: Path) -> None:
    with files_of_at_most(LIMIT):
        run = to_the_end(tmp_path, "run.steps=4", "checkpoints.every=2", *BIGGER)
    assert run.code == 1
    assert run.state["status"] == "failed"
    assert "cannot be written" in run.state["error"]
    assert "File too large" in run.state["error"]
    assert run.state["error"].splitlines()[0] in run.status
    assert [path.name for path in run.dir.checkpoints.glob("step-*") if not path.name.endswith(".partial")] == []
    assert run.dir.attempts() == [1]
    assert run.passes_audit()
    assert prl("resume", str(run.dir.path)).returncode == 0
    assert (run.state["status"], run.state["step"]) == ("finished", 6)
    assert run.passes_audit()


# --- garbage, and a clock that jumps ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def at_the_same_time(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Two runs that have nothing to do with each other."""
    garbage, clock = tmp_path_factory.mktemp("garbage"), tmp_path_factory.mktemp("clock")
    (garbage / "rewards.py").write_text(NAN)
    (garbage / "prompts.jsonl").write_text("".join(f'{{"prompt": "say {letter}"}}\n' for letter in "abcdefghij"))
    (clock / "sitecustomize.py").write_text(textwrap.dedent(JUMPS))
    source = f'file = "{garbage}/prompts.jsonl", reward = "{garbage}/rewards.py:reward", eval_share = 0.0'
    environment = f'environments=[{{type = "functions", name = "nan", {source}}}]'
    with ThreadPoolExecutor() as pool:
        bad = pool.submit(
            to_the_end,
            garbage,
            *("run.steps=5", "warmup.steps=0", "evaluation.every=0", environment),
            plugins='"functions"',
        )
        jumping = pool.submit(
            to_the_end, clock, "run.steps=5", "checkpoints.every=2", "failures.silence=60", PYTHONPATH=str(clock)
        )
        return {"garbage": bad.result(), "clock": jumping.result()}


def test_a_worker_that_returns_garbage_halts_the_run_and_trains_nothing(at_the_same_time: dict[str, Ended]) -> None:
    run = at_the_same_time["garbage"]
    assert run.code == 1
    assert run.state["status"] == "failed"
    assert "64 of the last 64 groups were lost to failures, more than failures.share = 0.5 allows" in run.state["error"]
    assert "64 of the last 64 groups were lost to failures" in run.status
    assert (run.rl_steps, run.rollouts) == ([], [])
    assert run.dir.attempts() == [1]
    assert run.passes_audit()


def test_a_wall_clock_that_jumps_changes_nothing(at_the_same_time: dict[str, Ended]) -> None:
    run = at_the_same_time["clock"]
    assert run.code == 0
    assert (run.state["status"], run.state["step"]) == ("finished", 7)
    assert Reader(RunDir(run.dir.path)).read() == []
    assert run.failures() == []
    assert run.passes_audit()
