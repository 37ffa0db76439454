"""Assumptions from the record of a past run: metrics.jsonl, ledger.sqlite, run.toml.

What the record says outright is taken: lengths by group, the share of missing rollouts, seconds of publication, and of
an optimizer step: forward and backward in proportion to its sampled tokens (prompts in proportion too, which holds as
long as tasks stay alike), the rest as a constant. How fast engines decode is not in it, only how long they computed for
what was trained; so the run is simulated, with its own config, and decoding scaled until the simulated engines take as
long. The ratio of decode_base to decode_per_sequence and the environments' latency stay what they were assumed to be.

Lengths are those of every group that arrived, trained or not; of what was cut in flight nobody knows them.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs

from prl.errors import UserError
from prl.ledger.read import exists, snapshot
from prl.report.load import metric_rows
from prl.run_dir import RunDir
from prl.simulate.assumptions import Assumptions
from prl.simulate.figures import Figures

_LENGTHS = """
    SELECT i.group_id, r.length FROM issues i JOIN rollouts r ON r.issue = i.id
    WHERE i.id IN (SELECT max(issue) FROM rollouts JOIN issues ON id = issue WHERE feed = 'rl' GROUP BY group_id)
    ORDER BY i.group_id, r.member
"""
_COMPUTED = "time/forward_backward"
_FEWEST_STEPS = 3
_MOST_ROUNDS = 8  # of scaling; one is not enough, since slower engines hold other numbers of sequences at once
_PRECISION = 0.005  # of engine seconds per token


@attrs.frozen(kw_only=True)
class Recorded:
    """A past run, as far as a simulation can be compared with it."""

    steps: int
    tokens_per_second: float
    idle_trainer: float
    idle_engine: float
    staleness_mean: float
    engine_seconds_per_token: float
    """Seconds in which one engine computed, on average over engines, per trained token of the run."""
    step_base: float
    """Seconds of a step in which the trainer did neither wait nor go forward and backward."""
    step_per_token: float
    """Seconds of forward and backward per sampled token."""
    publish: float
    groups: tuple[tuple[int, ...], ...]
    """Lengths of rollouts, by group: of the last attempt that arrived."""


def read(run_dir: RunDir) -> Recorded:
    """The record of a run that may still be going; UserError when there is too little of it."""
    rows = _steps(run_dir)
    groups = _groups(run_dir)
    if len(rows) < _FEWEST_STEPS or not groups:
        raise UserError(
            f"{run_dir.path} has the record of {len(rows)} usable rl steps and {len(groups)} groups; fitting needs at "
            f"least {_FEWEST_STEPS} steps and their groups"
        )
    seconds = [row["time/step"] for row in rows]
    tokens = sum(row["tokens/sampled"] for row in rows)
    idle_engine = _mean(row["idle/engine"] for row in rows)
    return Recorded(
        steps=len(rows),
        tokens_per_second=tokens / sum(seconds),
        idle_trainer=_mean(row["idle/trainer"] for row in rows),
        idle_engine=idle_engine,
        staleness_mean=_mean(row.get("staleness/mean", 0.0) for row in rows),
        engine_seconds_per_token=(1.0 - idle_engine) * sum(seconds) / tokens,
        step_base=max(0.0, _mean(row["time/step"] * (1.0 - row["idle/trainer"]) - row[_COMPUTED] for row in rows)),
        step_per_token=sum(row[_COMPUTED] for row in rows) / tokens,
        publish=statistics.median(row.get("time/publish", 0.0) for row in rows),
        groups=groups,
    )


def _steps(run_dir: RunDir) -> list[Mapping[str, Any]]:
    """Metrics of rl steps that tell what a simulation needs, the last attempt at each, without the first (start-up)."""
    needed = {"time/step", "tokens/sampled", "idle/trainer", "idle/engine", _COMPUTED}
    latest = {row["step"]: row for row in metric_rows(run_dir.metrics) if row.get("phase") == "rl"}
    rows = [latest[step] for step in sorted(latest)][1:]
    return [row for row in rows if needed <= row.keys() and row["tokens/sampled"]]


def _groups(run_dir: RunDir) -> tuple[tuple[int, ...], ...]:
    lengths: dict[int, list[int]] = defaultdict(list)
    for group_id, length in snapshot(run_dir.ledger).execute(_LENGTHS) if exists(run_dir.ledger) else ():
        lengths[group_id].append(max(1, length))
    return tuple(map(tuple, lengths.values()))


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


# --- from the record to assumptions -----------------------------------------------------------------------------------
def fit(
    recorded: Recorded, assumed: Assumptions, *, group_size: int, simulate: Callable[[Assumptions], Figures]
) -> tuple[Assumptions, Figures]:
    """What `recorded` says, `assumed` where it is silent; and the simulation of the recorded run under it.

    `group_size` is the recorded run's; `simulate` runs its config.
    """
    fitted = attrs.evolve(
        assumed,
        recorded=recorded.groups,
        failure=1.0 - sum(map(len, recorded.groups)) / (group_size * len(recorded.groups)),
        step_base=recorded.step_base,
        step_per_token=recorded.step_per_token,
        publish=recorded.publish,
    )
    figures = simulate(fitted)
    for _ in range(_MOST_ROUNDS):
        scale = recorded.engine_seconds_per_token / figures.engine_seconds_per_token
        if abs(scale - 1.0) < _PRECISION:
            break
        fitted = attrs.evolve(
            fitted, decode_base=fitted.decode_base * scale, decode_per_sequence=fitted.decode_per_sequence * scale
        )
        figures = simulate(fitted)
    return fitted, figures
