"""Which curves a report shows, of which metrics (docs/architecture.md), and what they mean in a sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs

from prl.report.plots import Point, Series, line_chart, stacked_chart


@attrs.frozen(kw_only=True)
class Chart:
    """A chart to be: `metrics` maps a pattern of metric names to the name of the curve (`\\1`: the matched group)."""

    title: str
    meaning: str
    metrics: Mapping[str, str]
    kind: Literal["line", "log", "stacked"] = "line"
    from_zero: bool = True
    smoothed: bool = True
    distinct: bool = False
    """Leave out a curve that equals an earlier one: a mean over one environment."""
    phases: frozenset[str] = frozenset({"rl"})
    x: str = "step"

    def series(self, rows: Sequence[Mapping[str, Any]]) -> list[Series]:
        """The curves that the rows have anything for, in the order of the patterns."""
        rows = [row for row in rows if row.get("phase", "rl") in self.phases]
        names = sorted({name for row in rows for name in row})
        found: list[Series] = []
        for pattern, label in self.metrics.items():
            for match in filter(None, (re.fullmatch(pattern, name) for name in names)):
                missing = 0.0 if self.kind == "stacked" else None
                points = points_of(rows, x=self.x, y=match.string, missing=missing)
                if points and not (self.distinct and points in [s.points for s in found]):
                    found.append(Series(name=match.expand(label), points=points))
        return found

    def draw(self, series: Sequence[Series]) -> str:
        if self.kind == "stacked":
            return stacked_chart(series)
        if self.kind == "log":
            return line_chart(series, scale="log")
        return line_chart(series, from_zero=self.from_zero, smoothed=self.smoothed)


def points_of(rows: Sequence[Mapping[str, Any]], *, x: str, y: str, missing: float | None) -> list[Point]:
    """(x, y) of the rows that have both, ascending in x; `missing` stands in for an absent y once y was seen at all."""
    points = []
    for row in rows:
        value = row.get(y, missing)
        if x in row and value is not None and math.isfinite(value):
            points.append((float(row[x]), float(value)))
    return sorted(points)


STEP_CHARTS: tuple[Chart, ...] = (
    Chart(
        title="Reward",
        meaning="Mean reward of the groups trained in a step, exploration noise included.",
        metrics={"reward/(?!mean)(.+)": r"\1", "reward/mean": "mean"},
        distinct=True,
    ),
    Chart(
        title="Entropy",
        meaning="Mean entropy of the policy over trained tokens, in nats: falls as the policy commits itself.",
        metrics={"entropy": "entropy"},
    ),
    Chart(
        title="Length",
        meaning="Sampled tokens per rollout.",
        metrics={"length/mean": "tokens"},
    ),
    Chart(
        title="Truncated",
        meaning="Share of rollouts that a length limit cut.",
        metrics={"length/truncated": "share"},
    ),
    Chart(
        title="Loss",
        meaning="Policy loss per token. Its sign and size say little; sudden jumps do.",
        metrics={"loss/rl": "rl"},
        from_zero=False,
    ),
    Chart(
        title="Importance ratio",
        meaning="Probability of a token under the trained policy over that under the one that sampled it, on average.",
        metrics={"loss/rl/ratio": "ratio"},
        from_zero=False,
    ),
    Chart(
        title="Masked",
        meaning="Share of tokens that the loss took out, or clipped, because they had moved too far.",
        metrics={"loss/rl/(masked|clipped)": r"\1"},
    ),
    Chart(
        title="Warm-up loss",
        meaning="Cross-entropy per token on the environment's demonstrations, before reinforcement learning.",
        metrics={"loss/ce": "ce"},
        phases=frozenset({"warmup"}),
    ),
    Chart(
        title="Gradient norm",
        meaning="Global norm before clipping.",
        metrics={"grad_norm": "norm"},
    ),
    Chart(
        title="k3 mismatch",
        meaning=(
            "Mean of e^d - d - 1, d = trainer minus engine log-probability. "
            "Fresh: tokens sampled by the very version being trained, so pure numerics."
        ),
        metrics={"mismatch/k3": "all tokens", "mismatch/k3_fresh": "fresh"},
        kind="log",
    ),
    Chart(
        title="Staleness",
        meaning="Version being trained minus version that sampled a token.",
        metrics={"staleness/mean": "mean", "staleness/max": "max"},
    ),
    Chart(
        title="Staleness shares",
        meaning="Share of sampled tokens at each staleness.",
        metrics={r"staleness/(\d+)": r"\1"},
        kind="stacked",
    ),
    Chart(
        title="Tokens per second",
        meaning="Sampled tokens of trained rollouts per second of wall time.",
        metrics={"tokens/per_second": "tok/s"},
    ),
    Chart(
        title="Idle",
        meaning="Share of the time in which trainer or engine computed nothing.",
        metrics={"idle/(.+)": r"\1"},
    ),
    Chart(
        title="Seconds",
        meaning="Time of a step, of publishing its weights, and of the trainer's phases.",
        metrics={"time/(.+)": r"\1"},
    ),
    Chart(
        title="Learning rate",
        meaning="Of the optimizer step.",
        metrics={"learning_rate": "learning rate"},
        smoothed=False,
        phases=frozenset({"warmup", "rl"}),
    ),
)
EVAL_CHARTS: tuple[Chart, ...] = (
    Chart(
        title="Held-out accuracy",
        meaning="Share of held-out tasks solved; none of them is ever trained on.",
        metrics={"eval/(.+)/accuracy": r"\1"},
        smoothed=False,
        phases=frozenset({"eval"}),
        x="eval/version",
    ),
)
