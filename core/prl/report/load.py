"""The files of a run directory as one record. A run may still be going, or have died at any point."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from prl.report.samples import Sampled, sample
from prl.run_dir import RunDir, read_json

_DROPPED = "dropped/"


@attrs.frozen(kw_only=True)
class Record:
    """What is known about a run."""

    directory: Path
    status: str
    error: str
    config_text: str
    config: Mapping[str, Any]
    plugins: Sequence[Mapping[str, Any]]
    """Entries of plugins.lock."""
    libraries: Mapping[str, str | None]
    """Versions of Python and of the packages that plugins.lock names; None: not installed."""
    steps: Sequence[Mapping[str, Any]]
    """Metrics of optimizer steps, ascending: the last attempt at each step."""
    evaluations: Sequence[Mapping[str, Any]]
    """Metrics of evaluations, by ascending version."""
    dropped: Mapping[str, int]
    """Reason -> groups, over all attempts."""
    samples: Sequence[Sampled]

    @property
    def seconds(self) -> float:
        """From the first line of metrics to the last."""
        times = [row["time"] for row in (*self.steps, *self.evaluations) if "time" in row]
        return max(times) - min(times) if times else 0.0


def load(run_dir: RunDir) -> Record:
    config_text = run_dir.config.read_text()
    state = read_json(run_dir.state) or {}
    lock = read_json(run_dir.lock) or {}
    rows = list(metric_rows(run_dir.metrics))
    return Record(
        directory=run_dir.path,
        status=state.get("status", "unknown"),
        error=state.get("error") or "",
        config_text=config_text,
        config=tomllib.loads(config_text),
        plugins=lock.get("plugins", []),
        libraries={"python": lock.get("python"), **lock.get("libraries", {})},
        steps=_last_of_each([r for r in rows if r.get("phase") != "eval"], "step"),
        evaluations=_last_of_each([r for r in rows if r.get("phase") == "eval"], "eval/version"),
        dropped=dropped_groups(rows),
        samples=sample(run_dir.rollouts),
    )


def metric_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of metrics.jsonl; a line that is being written is left out."""
    if not path.is_file():
        return
    with path.open() as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def _last_of_each(rows: Sequence[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    """A resumed run repeats steps: what came last is what was kept."""
    latest = {row[key]: row for row in rows if key in row}
    return [latest[value] for value in sorted(latest)]


def dropped_groups(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update({k.removeprefix(_DROPPED): int(v) for k, v in row.items() if k.startswith(_DROPPED)})
    return {reason: count for reason, count in counts.most_common() if count}
