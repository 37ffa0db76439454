"""The plain form of the console: lines for a log file, a pipe or a terminal that cannot be redrawn.

Also the summary that both forms end with. Knows nothing about rich.
"""

from __future__ import annotations

import shlex

from prl_console import text
from prl_console.view import RunView


def step_line(view: RunView) -> str:
    """Where the run stands, in one line.

    Example:
        step  120/600  reward 0.61  held-out 0.74  staleness 0.90 max 2  k3 3.1e-12  12.3k tok/s  left 3m10s
    """
    parts = [_position(view), *(_warmup(view) if view.phase == "warmup" else _rl(view))]
    parts.append(f"left {text.duration(view.seconds_left)}")
    return "  ".join(parts)


def _position(view: RunView) -> str:
    width = len(str(view.steps))
    return f"step {view.step:>{width}}/{view.steps}"


def _warmup(view: RunView) -> list[str]:
    return ["warm-up", f"loss {text.fixed(view.metrics.get('loss/ce'), 3)}"]


def _rl(view: RunView) -> list[str]:
    metrics = view.metrics
    parts = [f"reward {text.fixed(view.reward.latest):>4}"]
    if view.accuracy:
        parts.append(f"held-out {held_out(view)}")
    parts += [
        f"staleness {text.fixed(metrics.get('staleness/mean'))} max {text.count(metrics.get('staleness/max'))}",
        f"k3 {text.small(metrics.get('mismatch/k3')):>7}",
        f"{text.count(view.speed.latest):>5} tok/s",
    ]
    return parts


def held_out(view: RunView) -> str:
    """The latest held-out accuracy, of every environment when there are several."""
    if len(view.accuracy) == 1:
        return text.fixed(next(iter(view.accuracy.values())).latest)
    return " ".join(f"{name} {text.fixed(curve.latest)}" for name, curve in view.accuracy.items())


def evaluation_line(view: RunView) -> str:
    version = text.count(view.metrics.get("eval/version"))
    return f"held-out accuracy of version {version}: {held_out(view)}"


def summary(view: RunView, error: BaseException | None) -> list[str]:
    """What a run ends with: how it ended, what it achieved, where to look further."""
    took = f"{text.duration(view.elapsed)}, {view.step} of {view.steps} steps"
    ended = f"failed after {took}" if error else f"{_ending(view)} in {took}"
    lines = [f"{view.name} {ended}"]
    lines += [f"  error     {line}" for line in str(error).splitlines()[:5]] if error else []
    lines += [f"  held-out  {_change(name, view)}" for name in view.accuracy]
    directory = shlex.quote(view.directory)
    lines.append(f"  curves    prl report {directory}")
    lines.append(f"  logs      prl logs {directory}")
    return lines


def _ending(view: RunView) -> str:
    return "finished" if view.step >= view.steps else "stopped"


def _change(name: str, view: RunView) -> str:
    curve = view.accuracy[name]
    first, latest, best = text.fixed(curve.first), text.fixed(curve.latest), text.fixed(curve.best)
    return f"{name} accuracy {first} -> {latest} (best {best})"
