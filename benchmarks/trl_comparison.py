"""prl beside TRL's GRPOTrainer on one CPU workload, in one invocation: tokens per second and per CPU-second.

    python benchmarks/trl_comparison.py

Both train the same 312,064-parameter Qwen3 on 64 rollouts of exactly 64 tokens a step. TRL (trl_grpo.py) runs with one
and with two threads; prl (trl_comparison.toml) runs as `prl launch` does. Measured is the steady state, from the end of
step SKIPPED to that of step STEPS: start-up is left out of both, and prl goes on for MARGIN steps, so that its engine
is not idle already at the end of what is measured. CPU time is that of a contender and all its children. They take
turns for ROUNDS rounds and the best round of each counts, since other load only ever slows.

Results go to benchmarks/results/. See README.md for what to install.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs

FOLDER = Path(__file__).parent
TOKENS_PER_STEP = 64 * 64
STEPS, SKIPPED, MARGIN, ROUNDS = 40, 8, 5, 2
POLL_SECONDS = 0.02
TICKS = os.sysconf("SC_CLK_TCK")


@attrs.frozen(kw_only=True)
class Speed:
    """Completion tokens over a steady stretch of a run."""

    tokens: int
    wall: float
    cpu: float

    @property
    def per_second(self) -> float:
        return self.tokens / self.wall

    @property
    def per_cpu_second(self) -> float:
        return self.tokens / self.cpu


# --- contenders -------------------------------------------------------------------------------------------------------
def trl(python: str, threads: int) -> Speed:
    """Rows come from trl_grpo.py's own meter: one process, whose clock is what counts."""
    command = [python, str(FOLDER / "trl_grpo.py"), "--threads", str(threads), "--steps", str(STEPS)]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    rows = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith('{"step"')]
    first, last = rows[SKIPPED - 1], rows[-1]
    steps = last["step"] - first["step"]
    return Speed(tokens=steps * TOKENS_PER_STEP, wall=last["wall"] - first["wall"], cpu=last["cpu"] - first["cpu"])


def prl(python: str) -> Speed:
    """Polls metrics.jsonl and reads the process tree's CPU time whenever a step was added."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        edits = ("--set", f"run.dir={run_dir}", "--set", f"run.steps={STEPS + MARGIN}")
        command = [python, "-m", "prl", "launch", str(FOLDER / "trl_comparison.toml"), *edits]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            marks = list(_marks(process, run_dir / "metrics.jsonl"))
        if process.returncode:
            raise SystemExit(f"prl launch exited with {process.returncode}")
    first, last = (next(mark for mark in marks if mark["step"] >= step) for step in (SKIPPED, STEPS))
    return Speed(
        tokens=last["tokens"] - first["tokens"], wall=last["time"] - first["time"], cpu=last["cpu"] - first["cpu"]
    )


def _marks(process: subprocess.Popen[bytes], metrics: Path) -> Iterator[dict[str, Any]]:
    """Step, its end, tokens trained so far and CPU-seconds so far, after every poll that saw a new step."""
    tokens = position = 0
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        if not metrics.exists():
            continue
        with metrics.open() as file:
            file.seek(position)
            added = file.read()
        added = added[: added.rfind("\n") + 1]
        position += len(added.encode())
        rows = [row for row in map(json.loads, added.splitlines()) if row["phase"] == "rl"]
        tokens += sum(int(row["tokens/sampled"]) for row in rows)
        if rows:
            yield {"step": rows[-1]["step"], "time": rows[-1]["time"], "tokens": tokens, "cpu": tree_cpu(process.pid)}


def tree_cpu(root: int) -> float:
    """CPU-seconds of a process and all its descendants, the ones that ended and were waited for included."""
    parents, seconds = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended while we looked
            continue
        pid = int(stat.parent.name)
        parents[pid] = int(fields[1])
        seconds[pid] = sum(map(int, fields[11:15])) / TICKS
    return sum(spent for pid, spent in seconds.items() if _descends(pid, root, parents))


def _descends(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid and pid != root:
        pid = parents.get(pid, 0)
    return pid == root


# --- comparison -------------------------------------------------------------------------------------------------------
def compare(trl_python: str, prl_python: str) -> dict[str, list[Speed]]:
    contenders: dict[str, Callable[[], Speed]] = {
        "TRL, 1 thread": lambda: trl(trl_python, 1),
        "prl": lambda: prl(prl_python),
        "TRL, 2 threads": lambda: trl(trl_python, 2),
    }
    rounds: dict[str, list[Speed]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, measure in contenders.items():
            rounds[name].append(measure())
            print(f"{name}: {_shown(rounds[name][-1])}", file=sys.stderr, flush=True)
    return rounds


def _shown(speed: Speed) -> str:
    return f"{speed.per_second:,.0f} tok/s, {speed.per_cpu_second:,.0f} tok/CPU-s"


def table(best: dict[str, dict[str, float]]) -> str:
    fastest = {key: max(v[key] for name, v in best.items() if name != "prl") for key in ("wall", "cpu")}
    lines = [f"{'':<16}{'tok/s':>10}{'':>8}{'tok/CPU-s':>12}"]
    for name, value in best.items():
        ratios = [f"{value[key] / fastest[key]:.2f}x" for key in ("wall", "cpu")]
        lines.append(f"{name:<16}{value['wall']:>10,.0f}{ratios[0]:>8}{value['cpu']:>12,.0f}{ratios[1]:>8}")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = sorted({line.partition(":")[2].strip() for line in lines if line.startswith("model name")})
    load, *_ = os.getloadavg()
    return {"cpu": models, "cores": os.cpu_count(), "load before": load, "python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default=sys.executable, help="Python that has trl; by default this one")
    parser.add_argument("--name", default="trl_comparison", help="results are written to results/NAME.json")
    arguments = parser.parse_args()
    where = machine()
    rounds = compare(arguments.trl_python, sys.executable)
    best = {
        name: {"wall": max(s.per_second for s in speeds), "cpu": max(s.per_cpu_second for s in speeds)}
        for name, speeds in rounds.items()
    }
    print(table(best))
    record = {"machine": where, "best": best, "rounds": {n: [attrs.asdict(s) for s in v] for n, v in rounds.items()}}
    results = FOLDER / "results"
    results.mkdir(exist_ok=True)
    (results / f"{arguments.name}.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
