"""Numbers of a step, named as docs/architecture.md names them. Pure functions of batches, groups and reports."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

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
_ROUTED = ("replayed", "missing", "refused")
_PRIVATE = "throughput/"
"""Prefix of what ranks report for others to be computed from."""
_COMPUTING = ("forward_backward", "optimizer")
"""Phases of a rank that are a step's own."""


def trainer_metrics(batch: Batch, reports: Sequence[StepDone]) -> dict[str, float]:
    """Losses, mismatch, entropy: sums over ranks divided by their global counts; times of the slowest rank."""
    sums: dict[str, float] = defaultdict(float)
    for report in reports:
        for name, value in report.sums.items():
            sums[name] += value
    metrics = {name: sums[name] / _stream_tokens(name, batch) for name in sums if name.startswith("loss/")}
    metrics |= {name: sums[total] / sums[count] for name, (total, count) in _MEANS.items() if sums.get(count)}
    values = {name: value for name, value in reports[0].values.items() if not name.startswith(_PRIVATE)}
    routed = _route_metrics(sums)
    return {**_throughput(reports, sums), **metrics, **routed, **values, **_seconds(reports), **_peaks(reports)}


def _route_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Shares of the tokens whose experts the engine should have told; shares that differ are of those replayed."""
    if not sums.get("routes/count"):
        return {}
    metrics = {f"routes/{name}": sums[f"routes/{name}"] / sums["routes/count"] for name in _ROUTED}
    replayed = sums["routes/replayed"]
    differ = {name: sums[name] / replayed for name in sums if name.startswith("routes/differ/")} if replayed else {}
    metrics |= {**differ, "routes/differ": _mean(differ.values())} if differ else {}
    if sums.get("routes_fresh/count"):
        metrics["routes/differ_fresh"] = sums["routes_fresh/differ"] / sums["routes_fresh/count"]
    return metrics


def _throughput(reports: Sequence[StepDone], sums: Mapping[str, float]) -> dict[str, float]:
    """Per device, while the slowest rank computes; `mfu` where the device is known."""
    seconds = max(sum(report.seconds.get(phase, 0.0) for phase in _COMPUTING) for report in reports)
    if seconds <= 0 or not sums.get("throughput/tokens"):
        return {}
    per_device = 1 / seconds / len(reports)
    metrics = {"tokens/per_second_per_device": sums["throughput/tokens"] * per_device}
    if flops := sums.get("throughput/flops"):
        metrics["flops/per_second_per_device"] = flops * per_device
        if peak := reports[0].values.get("throughput/peak"):
            metrics["mfu"] = flops * per_device / peak
    return metrics


def _peaks(reports: Sequence[StepDone]) -> dict[str, float]:
    names = {name for report in reports for name in report.peaks}
    return {name: max(report.peaks.get(name, 0.0) for report in reports) for name in sorted(names)}


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
