"""The live form of the console, drawn with rich.

The display redraws itself in a thread of rich's, at the rate it is told; one drawing takes a few milliseconds, which is
why the rate is about one a second. Knows nothing about how a run works: everything shown is in `view.py`.
"""

from __future__ import annotations

import shlex
import threading

from rich.box import ROUNDED
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from prl_console import text
from prl_console.view import Curve, RunView

MAX_WIDTH = 100
_LABEL = 13
_HISTOGRAM_ROWS = 5


class LiveDisplay:
    """A panel at the bottom of the terminal; what others print scrolls above it."""

    def __init__(self, view: RunView, console: Console, *, interval: float, lock: threading.Lock) -> None:
        self._view = view
        self._lock = lock
        self._console = console
        self._live = Live(
            console=console, get_renderable=self._draw, refresh_per_second=1 / interval, redirect_stderr=False
        )

    def start(self) -> None:
        self._live.start()

    def stop(self) -> None:
        self._live.stop()

    def _draw(self) -> Panel:
        with self._lock:
            return panel(self._view, min(self._console.width, MAX_WIDTH))


def panel(view: RunView, width: int) -> Panel:
    """The whole display, `width` characters wide."""
    inner = width - 4
    body = Table.grid(padding=(0, 0))
    body.add_column(width=inner)
    body.add_row(_progress(view, inner))
    body.add_row("")
    body.add_row(_details(view, inner))
    return Panel(
        body,
        box=ROUNDED,
        width=width,
        title=f"[bold]prl[/] · {view.name}",
        title_align="left",
        subtitle=Text(f"prl report {shlex.quote(view.directory)}", style="dim", overflow="ellipsis"),
        subtitle_align="left",
        border_style="blue",
    )


def _progress(view: RunView, width: int) -> Table:
    times = f" {view.step}/{view.steps}  {text.duration(view.elapsed)}, left {text.duration(view.seconds_left)}"
    row = Table.grid()
    phase = {"warmup": "warm-up", "rl": "training"}.get(view.phase, view.phase)
    row.add_column(width=_LABEL)
    row.add_column(width=max(10, width - _LABEL - len(times)))
    row.add_column(width=len(times))
    row.add_row(
        Text(phase, style="bold green"),
        ProgressBar(total=max(view.steps, 1), completed=view.step, complete_style="green", finished_style="green"),
        times,
    )
    return row


def _details(view: RunView, width: int) -> Table:
    rows = Table.grid()
    rows.add_column(width=_LABEL, style="dim")
    rows.add_column(width=width - _LABEL, no_wrap=True, overflow="ellipsis")
    training = bool(view.reward.values)
    if view.phase == "warmup":
        rows.add_row("loss", text.fixed(view.metrics.get("loss/ce"), 3))
    if training:
        rows.add_row("reward", _with_sparkline(text.fixed(view.reward.latest), view.reward, width - _LABEL))
    for name, curve in view.accuracy.items():
        rows.add_row("held-out", _held_out(name if len(view.accuracy) > 1 else "", curve, width - _LABEL))
    if training:
        _staleness_rows(view, rows, width - _LABEL)
        _health_rows(view, rows, width - _LABEL)
    if view.dropped.total():
        rows.add_row("dropped", f"{view.dropped.total()} groups: {text.tally(view.dropped)}")
    return rows


def _staleness_rows(view: RunView, rows: Table, width: int) -> None:
    mean, largest = view.metrics.get("staleness/mean"), view.metrics.get("staleness/max")
    rows.add_row("staleness", f"{text.fixed(mean):<8}mean, max {text.count(largest)}")
    for label, share in _histogram(view.staleness_shares):
        line = Text(f"{label:>7} ")
        line.append(text.bar(share, width - 14), style="magenta")
        line.append(f" {text.percent(share)}", style="dim")
        rows.add_row("", line)


def _health_rows(view: RunView, rows: Table, width: int) -> None:
    metrics = view.metrics
    everywhere, fresh = text.small(metrics.get("mismatch/k3")), text.small(metrics.get("mismatch/k3_fresh"))
    rows.add_row("k3 mismatch", f"{everywhere:<8}all, {fresh} fresh")
    rows.add_row("tokens/s", _with_sparkline(text.count(view.speed.latest), view.speed, width, floor=0.0))
    idle = text.percent(metrics.get("idle/trainer"))
    rows.add_row("idle", f"{idle:<8}trainer, {text.percent(metrics.get('idle/engine'))} engine")


def _with_sparkline(value: str, curve: Curve, width: int, *, floor: float | None = None) -> Text:
    line = Text(f"{value:<8}")
    line.append(text.sparkline(list(curve.values), width - len(line), floor=floor), style="cyan")
    return line


def _held_out(name: str, curve: Curve, width: int) -> Text:
    memory = f"  best {text.fixed(curve.best)}, first {text.fixed(curve.first)}"
    label = f"{name} " if name else ""
    line = Text(f"{label}{text.fixed(curve.latest):<8}", style="bold")
    line.append(text.sparkline(list(curve.values), min(30, width - len(memory) - len(line))), style="green not bold")
    line.append(memory, style="dim not bold")
    return line


def _histogram(shares: dict[int, float]) -> list[tuple[str, float]]:
    """At most five bars: the staler ones are added up in the last."""
    rows = [(str(k), share) for k, share in shares.items()]
    if len(rows) <= _HISTOGRAM_ROWS:
        return rows
    head, tail = rows[: _HISTOGRAM_ROWS - 1], rows[_HISTOGRAM_ROWS - 1 :]
    return [*head, (f"{tail[0][0]}+", sum(share for _, share in tail))]
