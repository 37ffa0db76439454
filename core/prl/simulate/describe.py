"""Simulations as rows of text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import attrs

from prl.simulate.assumptions import FLAGS, Assumptions
from prl.simulate.compare import Outcome
from prl.simulate.figures import Figures
from prl.simulate.fit import Recorded

Rows: TypeAlias = list[list[str]]

_HEAD = ["setting", "tokens/s", "trainer idle", "engines idle", "dropped", "wasted", "length bias", "staleness"]
_COMPARED = ("steps", "tokens_per_second", "idle_trainer", "idle_engine", "staleness_mean")


@attrs.frozen(kw_only=True)
class Study:
    """What was assumed, and what came of it."""

    assumptions: Assumptions
    outcomes: Sequence[Outcome]
    """The config as it is comes first."""
    past: tuple[Recorded, Figures] | None
    """The run that the assumptions were fitted to, and its simulation."""


def as_json(study: Study) -> dict[str, Any]:
    """JSON-ready."""
    document: dict[str, Any] = {
        "assumptions": {field.name: getattr(study.assumptions, field.name) for field in FLAGS},
        "outcomes": [
            {
                "changes": {path: new for path, (_, new) in outcome.changes.items()},
                "figures": attrs.asdict(outcome.figures),
            }
            for outcome in study.outcomes
        ],
    }
    if study.past:
        sides = zip(("recorded", "simulated"), study.past, strict=True)
        document["past"] = {side: {name: getattr(values, name) for name in _COMPARED} for side, values in sides}
    return document


def sections(study: Study) -> list[tuple[str, Rows]]:
    """(title, rows) in the order in which they are read."""
    now = study.outcomes[0].figures
    shown = [("assumed", _assumed(study.assumptions))]
    if study.past:
        shown.append(("the past run", _comparison(*study.past)))
    shown.append((f"as configured: {now.steps} steps in {now.seconds:,.0f} s", _details(now)))
    shown.append(("settings", [_HEAD, *(_row(outcome) for outcome in study.outcomes)]))
    single = [outcome for outcome in study.outcomes if len(outcome.changes) == 1]
    if single:
        shown.append(("what a change would buy", [[bought(now, outcome)] for outcome in single]))
    return shown


def bought(before: Figures, outcome: Outcome) -> str:
    """What a change buys, and what it costs, as a sentence; what does not move is left out."""
    after = outcome.figures
    change = ", ".join(f"{path} {old} -> {new}" for path, (old, new) in outcome.changes.items())
    gain = after.tokens_per_second / before.tokens_per_second - 1.0
    moved = [
        ("trainer idle", share(before.idle_trainer), share(after.idle_trainer)),
        ("engines idle", share(before.idle_engine), share(after.idle_engine)),
        ("mean staleness", f"{before.staleness_mean:.2f}", f"{after.staleness_mean:.2f}"),
        ("tokens wasted", share(before.tokens_wasted), share(after.tokens_wasted)),
        ("length bias", share(before.length_bias), share(after.length_bias)),
    ]
    parts = [f"{name} {old} -> {new}" for name, old, new in moved if old != new]
    return f"{change}: {', '.join([f'tokens per second {gain:+.0%}', *parts])}"


def share(value: float) -> str:
    """Percent to one digit, without a minus before zero.

    Example:
        >>> share(0.3072), share(-0.0001)
        ('30.7 %', '0.0 %')
    """
    return f"{round(100.0 * value, 1) + 0.0:.1f} %"


def _assumed(assumptions: Assumptions) -> Rows:
    rows = [[field.name.replace("_", " "), f"{getattr(assumptions, field.name):.4g}"] for field in FLAGS]
    if not assumptions.length_mean:
        lengths = f"those of {len(assumptions.recorded):,} groups of the past run"
        rows = [["lengths", lengths], *(row for row in rows if not row[0].startswith("length"))]
    return rows


def _comparison(recorded: Recorded, simulated: Figures) -> Rows:
    sides = (recorded, simulated)
    return [
        ["", "recorded", "simulated"],
        ["tokens per second", *(f"{side.tokens_per_second:,.0f}" for side in sides)],
        ["trainer idle", *(share(side.idle_trainer) for side in sides)],
        ["engines idle", *(share(side.idle_engine) for side in sides)],
        ["mean staleness", *(f"{side.staleness_mean:.2f}" for side in sides)],
    ]


def _details(figures: Figures) -> Rows:
    dropped = "none" if figures.length_dropped is None else f"{figures.length_dropped:,.0f}"
    lengths = f"issued {figures.length_issued:,.0f}, trained {figures.length_trained:,.0f}, dropped {dropped}"
    return [
        ["tokens per second", f"{figures.tokens_per_second:,.0f}"],
        ["idle", f"trainer {share(figures.idle_trainer)}, engines {share(figures.idle_engine)}"],
        ["decoding at once", f"{figures.sequences:.1f} sequences per engine"],
        ["staleness", f"{figures.staleness_mean:.2f} ({_histogram(figures.staleness)})"],
        ["groups", f"{figures.groups_trained:,} trained, {figures.given_up:,} given up"],
        ["attempts dropped", ", ".join(f"{count:,} {reason}" for reason, count in figures.dropped.items()) or "none"],
        ["tokens wasted", share(figures.tokens_wasted)],
        ["mean length", lengths],
        ["waiting", ", ".join(f"{name} {length:.1f}" for name, length in figures.queues.items())],
    ]


def _row(outcome: Outcome) -> list[str]:
    figures = outcome.figures
    return [
        outcome.name,
        f"{figures.tokens_per_second:,.0f}",
        share(figures.idle_trainer),
        share(figures.idle_engine),
        f"{sum(figures.dropped.values()):,}",
        share(figures.tokens_wasted),
        share(figures.length_bias),
        f"{figures.staleness_mean:.2f} ({_histogram(figures.staleness)})",
    ]


def _histogram(staleness: Mapping[int, float]) -> str:
    return ", ".join(f"{age}: {part:.0%}" for age, part in staleness.items())
