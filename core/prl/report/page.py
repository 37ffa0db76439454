"""A record as one self-contained HTML page. Every text of the run is escaped: completions are not to be trusted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from statistics import median
from typing import Any

from prl.report.charts import EVAL_CHARTS, STEP_CHARTS, Chart
from prl.report.load import Record
from prl.report.plots import Series, readable
from prl.report.samples import Row, Sampled


def render(record: Record) -> str:
    """The page, as text."""
    body = "".join(
        (_header(record), _tiles(record), _curves(record), _rollouts(record), _dropped(record), _composition(record))
    )
    files = resources.files("prl.report")
    style, script = (files.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(record.directory.name)}</title><style>{style}</style></head>"
        f"<body><main>{body}</main><script>{script}</script></body></html>\n"
    )


# --- what it was and how it went --------------------------------------------------------------------------------------
def _header(record: Record) -> str:
    status = escape(record.status)
    error = f'<p class="error">{escape(record.error)}</p>' if record.error else ""
    return (
        f'<h1>{escape(record.directory.name)} <span class="status {status}">{status}</span></h1>'
        f'<p class="quiet">{escape(composition(record.config))}</p>{error}'
    )


def composition(config: Mapping[str, Any]) -> str:
    """The choices of a config in one line: what is trained, on what, how."""
    names = [_type(config.get("model")), *(_name(e) for e in config.get("environments", ()))]
    names += [_type(config.get("advantage")), _type(config.get("losses", {}).get("rl")), _type(config.get("scheduler"))]
    names += [_type(config.get("optimizer")), _type(config.get("engine"))]
    return " · ".join(n for n in names if n)


def _type(section: Mapping[str, Any] | None) -> str:
    return str((section or {}).get("type", ""))


def _name(section: Mapping[str, Any]) -> str:
    return str(section.get("name") or section.get("type", ""))


def _tiles(record: Record) -> str:
    steps = [row for row in record.steps if row.get("phase") == "rl"]
    tiles = [_tile(f"held-out, {name}", _change(values)) for name, values in _held_out(record)]
    tiles += [
        _tile("reward, first and last tenth", _change(_tenths(_column(steps, "reward/mean")))),
        _tile("steps", str(int(record.steps[-1]["step"])) if record.steps else "0"),
        _tile("wall time", f"{record.seconds / 60:.1f} min"),
        _tile("tokens/s, median", _middle(_column(steps, "tokens/per_second"))),
        _tile("largest staleness", _largest(_column(steps, "staleness/max"))),
        _tile("k3 fresh, median", _middle(_column(steps, "mismatch/k3_fresh"))),
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile(label: str, value: str) -> str:
    return f'<div class="card tile"><b>{escape(value)}</b><span class="quiet">{escape(label)}</span></div>'


def _held_out(record: Record) -> list[tuple[str, list[float]]]:
    return [(s.name, [y for _, y in s.points]) for s in EVAL_CHARTS[0].series(record.evaluations)]


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row.get(name) is not None]


def _tenths(values: Sequence[float]) -> list[float]:
    part = max(1, len(values) // 10)
    return [sum(v) / len(v) for v in (values[:part], values[-part:]) if v]


def _change(values: Sequence[float]) -> str:
    return f"{values[0]:.2f} → {values[-1]:.2f}" if values else "-"


def _middle(values: Sequence[float]) -> str:
    return readable(median(values)) if values else "-"


def _largest(values: Sequence[float]) -> str:
    return f"{max(values):g}" if values else "-"


# --- curves -----------------------------------------------------------------------------------------------------------
def _curves(record: Record) -> str:
    cards = [_chart(chart, record.evaluations) for chart in EVAL_CHARTS]
    cards += [_chart(chart, record.steps) for chart in STEP_CHARTS]
    shown = "".join(cards) or '<p class="quiet">No metrics were recorded yet.</p>'
    note = "Over optimizer steps; held-out curves over policy versions. Faint: as measured; strong: running mean."
    return f'<h2>Curves</h2><p class="quiet">{note}</p><div class="charts">{shown}</div>'


def _chart(chart: Chart, rows: Sequence[Mapping[str, Any]]) -> str:
    series = chart.series(rows)
    drawing = chart.draw(series)
    if not drawing:
        return ""
    entries = "".join(_legend_entry(s, index, chart.kind, len(series)) for index, s in enumerate(series))
    return (
        f'<div class="card chart"><h3>{escape(chart.title)}</h3><p class="quiet">{escape(chart.meaning)}</p>'
        f'<div class="legend">{entries}<span class="quiet at"></span></div>{drawing}</div>'
    )


def _legend_entry(series: Series, index: int, kind: str, count: int) -> str:
    value = readable(series.points[-1][1])
    mark = f'<i class="s{index}"></i>'
    if kind == "stacked":
        opacity = 0.2 + 0.7 * index / max(1, count - 1)
        mark = f'<i class="shade s3" style="opacity:{opacity:.2f}"></i>'
    return f'<span>{mark}{escape(series.name)} <b class="value">{value}</b></span>'


# --- rollouts ---------------------------------------------------------------------------------------------------------
def _rollouts(record: Record) -> str:
    tables = "".join(_sampled(sampled) for sampled in record.samples)
    return f"<h2>Rollouts</h2>{tables}" if tables else ""


def _sampled(sampled: Sampled) -> str:
    rows = "".join(_rollout(row, "best") for row in sampled.best) + "".join(
        _rollout(row, "worst") for row in sampled.worst
    )
    head = (
        '<tr><th></th><th class="number">step</th><th class="number">reward</th><th class="number">advantage</th>'
        '<th class="number">versions</th><th>prompt</th><th>completion</th></tr>'
    )
    return f'<div class="card scroll"><h3>{sampled.title}</h3><table>{head}{rows}</table></div><br>'


def _rollout(row: Row, label: str) -> str:
    prompt, completion = split_messages(row.get("messages", ()))
    numbers = (row.get("step"), row.get("reward"), row.get("advantage"), versions(row.get("versions")))
    cells = "".join(f'<td class="number">{escape(_number(n))}</td>' for n in numbers)
    return (
        f'<tr><td class="quiet">{label}</td>{cells}'
        f'<td class="text">{_turns(prompt)}</td><td class="text">{_turns(completion)}</td></tr>'
    )


def split_messages(messages: Iterable[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """What the policy was first told, and everything from its first word on."""
    turns = list(messages)
    first = next((i for i, m in enumerate(turns) if m.get("role") == "assistant"), len(turns))
    return turns[:first], turns[first:]


def _turns(messages: Sequence[Mapping[str, Any]]) -> str:
    return "".join(_turn(message, named=len(messages) > 1) for message in messages)


def _turn(message: Mapping[str, Any], *, named: bool) -> str:
    role = f"<b>{escape(str(message.get('role')))}</b> " if named else ""
    return f'<div class="turn">{role}{escape(_content(message))}</div>'


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content", "")
    return content if isinstance(content, str) else json.dumps(content)


def versions(value: Any) -> str:
    """`3`, or `3-5` when the tokens come from several versions."""
    if not isinstance(value, list) or not value:
        return "" if value in (None, []) else str(value)
    return f"{value[0]}-{value[-1]}" if value[0] != value[-1] else str(value[0])


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str("" if value is None else value)


# --- the rest ---------------------------------------------------------------------------------------------------------
def _dropped(record: Record) -> str:
    if not record.dropped:
        return ""
    rows = "".join(
        f'<tr><td>{escape(reason)}</td><td class="number">{count}</td></tr>' for reason, count in record.dropped.items()
    )
    return (
        '<h2>Dropped groups</h2><div class="card"><p class="quiet">Groups that were generated, or begun, and not '
        f'trained on.</p><table><tr><th>reason</th><th class="number">groups</th></tr>{rows}</table></div>'
    )


def _composition(record: Record) -> str:
    rows = "".join(
        f"<tr><td>{escape(str(p.get('name')))}</td><td>{escape(str(p.get('dist')))}</td>"
        f"<td>{escape(str(p.get('version')))}</td></tr>"
        for p in record.plugins
    )
    others = ", ".join(f"{name} {version}" for name, version in record.libraries.items() if version)
    return (
        '<h2>Composition</h2><div class="card"><table><tr><th>plugin</th><th>distribution</th><th>version</th></tr>'
        f'{rows}</table><p class="quiet">{escape(others)}</p>'
        f"<details><summary>Resolved config (run.toml)</summary><pre>{escape(record.config_text)}</pre></details></div>"
    )
