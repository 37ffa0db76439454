"""GLM-5.1, Kimi-K2.7 and Nemotron-3-Ultra, as toys, learn `configs/spell_backward.toml`: two words of it change.

    python -m benchmarks.three_families --jobs 3

Every family is a run of its own (`prl launch`: controller, engine, environment, trainer), told apart by `--plugins` and
`model.type` alone; the supervised start is longer than the config's for all of them. A run is asked to stop once its
held-out accuracy has reached the goal; one that lies in the folder of runs already is read and not repeated. Curves and
figures go to benchmarks/results/three_families.{svg,json}.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
from prl.report.plots import Series, line_chart
from prl.run_dir import RunDir

FOLDER = Path(__file__).parent
CONFIG = FOLDER.parent / "configs" / "spell_backward.toml"
FAMILIES = {"glm-5.1": "glm5", "kimi-k2.7": "kimi_k2", "nemotron-3-ultra": "nemotron3"}
ACCURACY = "eval/spell_backward/accuracy"
COLOURS = ("#2563c9", "#d2691e", "#2a8a5f")
STYLE = """text { font: 11px sans-serif; fill: #555 } .grid { stroke: #ddd } .pointer { display: none }
.line { fill: none; stroke-width: 2 } """


@attrs.frozen(kw_only=True)
class Learned:
    """What one run came to."""

    model: str
    steps: int
    """The supervised ones included."""
    warmup: int
    seconds: float
    """From the first step to the last evaluation."""
    curve: list[tuple[int, float]]
    """(step, held-out accuracy)"""
    mismatch_k3: float | None
    """Mean over the rl steps; None where there were none."""
    differ: float | None
    """Mean share of tokens and layers that the trainer's routers would have sent elsewhere."""

    @property
    def accuracy(self) -> float:
        return self.curve[-1][1]


def command(model: str, run: Path, options: argparse.Namespace) -> list[str]:
    changes = {
        "model.type": json.dumps(model),
        "run.dir": json.dumps(str(run)),
        "run.steps": options.steps,
        "run.seed": options.seed,
        "warmup.steps": options.warmup,
        "evaluation.every": options.every,
        "trackers": "[]",
    }
    sets = [word for path, value in changes.items() for word in ("--set", f"{path}={value}")]
    return [sys.executable, "-m", "prl", "launch", str(CONFIG), "--plugins", f"{FAMILIES[model]},no:console", *sets]


def learn(model: str, options: argparse.Namespace) -> Learned:
    """Launch, wait for the goal or the last step, and read what was recorded."""
    run = options.runs / model
    if RunDir(run).metrics.is_file():
        return learned(model, rows(RunDir(run)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (options.runs / f"{model}.log").open("w") as log:
        process = subprocess.Popen(command(model, run, options), stdout=log, stderr=log, env=environment)
        while process.poll() is None:
            reached = any(accuracy >= options.goal for _, accuracy in curve(rows(RunDir(run))))
            if reached and not RunDir(run).stop.exists():
                RunDir(run).stop.touch()
            try:
                process.wait(timeout=2.0)
            except subprocess.TimeoutExpired:
                continue
    return learned(model, rows(RunDir(run)))


def rows(run: RunDir) -> list[dict[str, Any]]:
    """Whole lines of the metrics so far."""
    if not run.metrics.is_file():
        return []
    return [json.loads(line) for line in run.metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]


def curve(recorded: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(row["step"], row[ACCURACY]) for row in recorded if ACCURACY in row]


def learned(model: str, recorded: Sequence[dict[str, Any]]) -> Learned:
    trained = [row for row in recorded if row["phase"] == "rl"]
    return Learned(
        model=model,
        steps=max(row["step"] for row in recorded),
        warmup=sum(row["phase"] == "warmup" for row in recorded),
        seconds=recorded[-1]["time"] - recorded[0]["time"],
        curve=curve(recorded),
        mismatch_k3=mean(row["mismatch/k3"] for row in trained),
        differ=mean(row["routes/differ"] for row in trained),
    )


def mean(values: Iterator[float]) -> float | None:
    column = list(values)
    return sum(column) / len(column) if column else None


def draw(results: Sequence[Learned]) -> str:
    """A picture that stands by itself: the report's chart, its style and a legend."""
    chart = line_chart([Series(name=r.model, points=r.curve) for r in results], from_zero=True, smoothed=False)
    style = STYLE + " ".join(f".s{i} {{ stroke: {colour} }}" for i, colour in enumerate(COLOURS))
    names = "".join(
        f'<text x="70" y="{150 + 14 * i}" style="fill: {COLOURS[i]}">{result.model}</text>'
        for i, result in enumerate(results)
    )
    opened = chart.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return opened.replace("</svg>", f"<style>{style}</style>{names}</svg>\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--runs", type=Path, default=Path("runs/three-families"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at one time; each keeps two cores busy")
    parser.add_argument("--steps", type=int, default=600, help="most rl steps")
    parser.add_argument("--warmup", type=int, default=200, help="supervised steps")
    parser.add_argument("--every", type=int, default=10, help="rl steps between evaluations")
    parser.add_argument("--goal", type=float, default=0.8, help="accuracy at which a run stops")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=FOLDER / "results")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda model: learn(model, options), options.models))
    for result in results:
        print(f"{result.model:<18} {result.accuracy:.3f} after {result.steps} steps, {result.seconds:.0f} s")
    (options.results / "three_families.svg").write_text(draw(results))
    record = {"goal": options.goal, "cores": os.cpu_count(), "runs": [attrs.asdict(result) for result in results]}
    (options.results / "three_families.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
