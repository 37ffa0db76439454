"""Numbers of a step, named as docs/architecture.md names them. Pure functions of batches, groups and reports."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from prl.messages import StepDone
from prl.score.credit import Scored
from prl.types import Batch, Rollout

_MEANS = {
    "mismatch/k3": ("mismatch/k3", "mismatch/count"),
    "mismatch/k3_fresh": ("mismatch_fresh/k3", "mismatch_fresh/count"),
    "entropy": ("entropy", "entropy/count"),
}
"""Metric -> names of the sum and of the count that trainer ranks report."""


def trainer_metrics(batch: Batch, reports: Sequence[StepDone]) -> dict[str, float]:
    """Losses, mismatch, entropy: sums over ranks divided by their global counts; times of the slowest rank."""
    sums: dict[str, float] = defaultdict(float)
    for report in reports:
        for name, value in report.sums.items():
            sums[name] += value
    metrics = {name: sums[name] / _stream_tokens(name, batch) for name in sums if name.startswith("loss/")}
    metrics |= {name: sums[total] / sums[count] for name, (total, count) in _MEANS.items() if sums.get(count)}
    return {**metrics, **reports[0].values, **_seconds(reports)}


def _stream_tokens(name: str, batch: Batch) -> int:
    """The denominator of `loss/<stream>` and `loss/<stream>/<metric>`."""
    return max((count for stream, count in batch.token_counts.items() if stream == name.split("/")[1]), default=1)


def _seconds(reports: Sequence[StepDone]) -> dict[str, float]:
    """`time/publish` is taken by publication to the engines, so what a rank spends on it is `time/export`."""
    phases = {phase for report in reports for phase in report.seconds}
    return {
        f"time/{'export' if phase == 'publish' else phase}": max(report.seconds.get(phase, 0.0) for report in reports)
        for phase in sorted(phases)
    }


def group_metrics(groups: Sequence[Scored]) -> dict[str, float]:
    """Rewards, accuracy and lengths; empty for a batch that was not made of groups."""
    by_environment: dict[str, list[float]] = defaultdict(list)
    for scored in groups:
        by_environment[scored.group.task.environment].append(_mean(scored.group.rewards))
    if not by_environment:
        return {}
    rollouts = [rollout for scored in groups for rollout in scored.group.rollouts]
    metrics = {f"reward/{name}": _mean(means) for name, means in sorted(by_environment.items())}
    metrics["reward/mean"] = _mean(mean for means in by_environment.values() for mean in means)
    metrics["length/mean"] = _mean(rollout.sampled_count for rollout in rollouts)
    metrics["length/truncated"] = _mean(rollout.truncated for rollout in rollouts)
    return {**metrics, **accuracy(rollouts, "accuracy/mean")}


def accuracy(rollouts: Iterable[Rollout], name: str) -> dict[str, float]:
    """Mean of the rollouts' `accuracy` metric under `name`; empty when none has it."""
    values = [rollout.metrics["accuracy"] for rollout in rollouts if "accuracy" in rollout.metrics]
    return {name: _mean(values)} if values else {}


def token_metrics(batch: Batch) -> dict[str, float]:
    """How many tokens, how many of them sampled, and the histogram of their staleness."""
    micro_batches = [micro for rank in batch.ranks for micro in rank]
    versions = np.concatenate([micro.versions[micro.own][micro.sampled[micro.own]] for micro in micro_batches])
    staleness = batch.version - versions
    metrics: dict[str, float] = {
        "tokens/trained": sum(len(micro.tokens[micro.own]) for micro in micro_batches),
        "tokens/sampled": len(staleness),
    }
    if len(staleness):
        metrics |= {"staleness/mean": float(staleness.mean()), "staleness/max": int(staleness.max())}
        counts = np.bincount(staleness).tolist()
        metrics |= {f"staleness/{k}": n / len(staleness) for k, n in enumerate(counts) if n}
    return metrics


def trainer_idle(reports: Sequence[StepDone], seconds: float) -> float:
    """Share of `seconds` that ranks spent waiting for orders, on average."""
    waited = _mean(report.seconds.get("wait", 0.0) for report in reports)
    return min(max(waited / seconds, 0.0), 1.0) if seconds > 0 else 0.0


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)
