"""A run whose processes are killed and stopped at random moments: what is lost, and how long it takes to recover.

    python -m benchmarks.chaos                    from the root of a checkout; some twenty minutes on two cores
    python -m benchmarks.chaos --strikes 20

One run of benchmarks/chaos.toml (two engines, two environment workers, two trainer ranks) under `prl launch`. A strike
is a SIGKILL or a SIGSTOP to one process, both as often for every kind, in a seeded order, at a random moment after the
run has trained an rl step that it never trained before; a second engine or environment worker may be struck before the
first is back. The run recovers by itself. After the last strike it is stopped, and resumed for LAST more steps and an
evaluation. Then its ledger is read: a strike is over for an engine or environment worker when a group was placed on its
successor, for the others when a step was trained again.

Results go to benchmarks/results/chaos.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import sqlite3
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, TypeAlias

import attrs
from prl.run_dir import RunDir, read_json
from prl.supervise.casualties import Casualty, Reader

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "chaos.json"
ROLES = ("engine", "environment", "trainer-rank", "trainer", "controller")
Kind: TypeAlias = tuple[str, signal.Signals]
KINDS: tuple[Kind, ...] = tuple((role, number) for role in ROLES for number in (signal.SIGKILL, signal.SIGSTOP))
PATIENCE = 300.0  # seconds without anything that was waited for
WARMUP = 80  # steps of benchmarks/chaos.toml
LAST = 20  # rl steps after the last strike
REWARD = "def exact(completion: str, answer: str) -> float:\n    return float(completion == answer)\n"
ALONE = ("engine", "environment")


@attrs.frozen(kw_only=True)
class Strike:
    """One signal to one process."""

    role: str
    index: int
    signal: signal.Signals
    at: float
    """Seconds since the epoch."""
    step: int
    """Newest step on record."""


@attrs.frozen(kw_only=True)
class Recovery:
    """What became of a strike: seconds until it was noticed, and until the work of the process was done again."""

    strike: Strike
    noticed: float
    recovered: float


@attrs.define(kw_only=True)
class Chaos:
    """A run under fire.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     chaos = Chaos(folder=Path(folder), seed=0)
        ...     code, strikes = chaos.run(2 * KINDS)
    """

    folder: Path
    seed: int
    edits: Sequence[str] = ()
    output: str = attrs.field(init=False, default="")
    _popen: Any = attrs.field(init=False, default=None)
    _random: random.Random = attrs.field(init=False)
    _stopped: set[int] = attrs.field(init=False, factory=set)

    def __attrs_post_init__(self) -> None:
        self._random = random.Random(self.seed)

    @property
    def dir(self) -> RunDir:
        return RunDir(self.folder / "run")

    def run(self, kinds: Sequence[Kind]) -> tuple[int, list[Strike]]:
        """Launch, strike in a random order, stop, and resume to the end; the last exit code, and what was struck."""
        order = self._random.sample(kinds, len(kinds))
        with (self.folder / "output").open("w+") as output:
            self._start(output, "launch", str(self._config()), *self._sets())
            try:
                struck = [self._strike(role, number) for role, number in order]
                self._until_trained(1)
                self.dir.stop.touch()
                self._until(lambda: self._popen.poll() is not None)
                self._start(output, "resume", str(self.dir.path), "--set", f"run.steps={self.steps + LAST}")
                self._until(lambda: self._popen.poll() is not None)
            finally:
                self._end()
                output.seek(0)
                self.output = output.read()
        return self._popen.returncode, struck

    def _start(self, output: IO[str], *words: str) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "prl", *words],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
        )

    def _config(self) -> Path:
        letters = "abcdefgh"
        rows = [
            {"prompt": f"{any_}{a}", "answer": b} for any_ in string.ascii_lowercase for a, b in pairwise(f"{letters}a")
        ]
        (self.folder / "next_letter.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (self.folder / "rewards.py").write_text(REWARD)
        return ROOT / "benchmarks" / "chaos.toml"

    def _sets(self) -> Iterator[str]:
        for edit in (f"run.dir={self.dir.path}", "run.steps=1000000", *self.edits):
            yield from ("--set", edit)

    def _end(self) -> None:
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGTERM)
            self._popen.send_signal(signal.SIGTERM)
            self._popen.wait()

    # --- strikes --------------------------------------------------------------------------------------------------
    def _strike(self, role: str, number: signal.Signals) -> Strike:
        """Wait until something new was trained, and then a little; strike, if anybody of that role is there."""
        self._until_trained(1 + self._random.randint(0, 2))
        time.sleep(self._random.uniform(0.0, 0.2))  # a moment inside a step, or inside a recovery
        found: list[tuple[int, int]] = []
        self._until(lambda: found.extend(self._living(role)) or bool(found))
        pid, index = self._random.choice(sorted(found))
        strike = Strike(role=role, index=index, signal=number, at=time.time(), step=self.newest_step)
        os.kill(pid, number)
        self._stopped |= {pid} if number is signal.SIGSTOP else set()
        return strike

    def _until_trained(self, more: int) -> None:
        mark = self.newest_step
        self._until(lambda: self.newest_step >= mark + more)

    def _until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self._popen.poll() is not None and not condition():
                raise RuntimeError(f"the run ended: {(self.folder / 'output').read_text()[-4000:]}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited in vain; state {read_json(self.dir.state)}")
            time.sleep(0.02)

    @property
    def steps(self) -> int:
        """Rl steps of a run that ended."""
        state = read_json(self.dir.state)
        assert state is not None, "a run that ended has a last word"
        return int(state["step"]) - WARMUP

    @property
    def newest_step(self) -> int:
        """Newest rl step in metrics.jsonl, which goes back when the run does."""
        if not self.dir.metrics.exists():
            return 0
        lines = [line for line in self.dir.metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return max((line["step"] for line in map(json.loads, lines) if line["phase"] == "rl"), default=0)

    def _living(self, role: str) -> Iterator[tuple[int, int]]:
        """(pid, index) of every process of the run with that role that was not stopped."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words, pid = path.read_text().split("\0"), int(path.parent.name)
                mine = str(self.dir.path) in words and "--role" in words and pid not in self._stopped
                if mine and words[words.index("--role") + 1] == role:
                    yield pid, self._index(words, path.parent / "environ")
            except (FileNotFoundError, ProcessLookupError):
                continue

    def _index(self, words: Sequence[str], environment: Path) -> int:
        rank = [entry for entry in environment.read_text().split("\0") if entry.startswith("RANK=")]
        return int(rank[0].removeprefix("RANK=")) if rank else int(words[words.index("--index") + 1])

    # --- afterwards -----------------------------------------------------------------------------------------------
    def recoveries(self, strikes: Sequence[Strike]) -> list[Recovery]:
        """Those that were noticed before the run ended."""
        casualties = Reader(self.dir).read()
        with closing(sqlite3.connect(self.dir.ledger)) as ledger:
            found = [_recovery(strike, casualties, ledger) for strike in strikes]
        return [recovery for recovery in found if recovery is not None]

    def lost(self) -> Mapping[str, int]:
        """Prompts of the feed, counted in the ledger: issued, trained, given up, and trained more than once."""
        with closing(sqlite3.connect(self.dir.ledger)) as ledger:
            trained = ledger.execute(
                "SELECT issues.feed, issues.group_id, count(*) FROM members JOIN issues ON issues.id = members.issue"
                " JOIN batches ON batches.id = members.batch"
                " WHERE batches.void_by IS NULL AND batches.done_at IS NOT NULL GROUP BY 1, 2"
            ).fetchall()
            given_up = ledger.execute(
                "SELECT count(*) FROM issues WHERE dropped IS NOT NULL AND NOT again AND void_by IS NULL"
            ).fetchone()[0]
        return {
            "trained": len(trained),
            "repeated": sum(1 for *_, count in trained if count > 1),
            "given_up": given_up,
        }


def _recovery(strike: Strike, casualties: Sequence[Casualty], ledger: sqlite3.Connection) -> Recovery | None:
    role = "trainer" if strike.role == "trainer-rank" else strike.role
    index = strike.index if role in ALONE else 0
    own = [c.at for c in casualties if c.at >= strike.at and (c.role, c.index) == (role, index)]
    whole = [c.at for c in casualties if c.at >= strike.at and c.role not in ALONE]
    noticed = min([*own, *whole], default=None)
    if noticed is None:
        return None
    query, values = {
        "engine": ("SELECT min(placed_at) FROM issues WHERE engine = ? AND placed_at > ?", (strike.index, noticed)),
        "environment": (
            "SELECT min(placed_at) FROM issues WHERE worker = ? AND placed_at > ?",
            (f"environment-{strike.index}", noticed),
        ),
    }.get(role, ("SELECT min(done_at) FROM batches WHERE done_at > ?", (noticed,)))
    recovered = ledger.execute(query, values).fetchone()[0]
    if recovered is None:
        return None
    return Recovery(strike=strike, noticed=noticed - strike.at, recovered=recovered - strike.at)


def audit(run_dir: RunDir) -> tuple[int, str]:
    """Exit code and words of `prl audit`."""
    done = subprocess.run(
        [sys.executable, "-m", "prl", "audit", str(run_dir.path)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def reward(run_dir: RunDir) -> float:
    """Held-out reward after the last step."""
    lines = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    last: float = [line["eval/next_letter/reward"] for line in lines if line["phase"] == "eval"][-1]
    return last


def summary(recoveries: Sequence[Recovery]) -> dict[str, dict[str, float]]:
    """By kind of strike: how many, and seconds, median and longest."""
    by_kind: dict[str, list[Recovery]] = defaultdict(list)
    for recovery in recoveries:
        by_kind[f"{recovery.strike.role} {recovery.strike.signal.name}"].append(recovery)
    return {
        kind: {
            "recoveries": len(found),
            "noticed_median": round(statistics.median(r.noticed for r in found), 2),
            "recovered_median": round(statistics.median(r.recovered for r in found), 2),
            "recovered_longest": round(max(r.recovered for r in found), 2),
        }
        for kind, found in sorted(by_kind.items())
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strikes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="prl-chaos-") as folder:
        chaos = Chaos(folder=Path(folder), seed=arguments.seed)
        started = time.monotonic()
        code, strikes = chaos.run([KINDS[number % len(KINDS)] for number in range(arguments.strikes)])
        seconds = time.monotonic() - started
        audited, words = audit(chaos.dir)
        recoveries = chaos.recoveries(strikes)
        results = {
            "command": " ".join(["python -m benchmarks.chaos", *sys.argv[1:]]),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "load": os.getloadavg()[0],
            "exit_code": code,
            "seconds": round(seconds),
            "steps": chaos.steps,
            "strikes": len(strikes),
            "kills": sum(s.signal is signal.SIGKILL for s in strikes),
            "stops": sum(s.signal is signal.SIGSTOP for s in strikes),
            "attempts": len(chaos.dir.attempts()),
            "recoveries": len(recoveries),
            "prompts": dict(chaos.lost()),
            "audit": "passed" if audited == 0 else words,
            "reward": reward(chaos.dir),
            "by_kind": summary(recoveries),
        }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(f"{json.dumps(results, indent=1)}\n")
    print(json.dumps(results, indent=1))
    return 0 if code == 0 and audited == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
