"""What the console knows about a run: the latest metrics and the little history that a person wants to see.

Knows the metric names of docs/architecture.md and nothing about terminals; `live.py` and `lines.py` draw it.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping

import attrs

HISTORY = 400
_SHARE = "staleness/"
_DROPPED = "dropped/"


@attrs.define(kw_only=True)
class Curve:
    """A quantity over time: its recent values, and the ones worth remembering.

    Example:
        >>> curve = Curve()
        >>> for value in (0.2, 0.9, 0.7):
        ...     curve.add(value)
        >>> curve.first, curve.best, curve.latest
        (0.2, 0.9, 0.7)
    """

    values: deque[float] = attrs.field(factory=lambda: deque(maxlen=HISTORY))
    first: float | None = None
    best: float | None = None

    def add(self, value: float) -> None:
        self.values.append(value)
        self.first = value if self.first is None else self.first
        self.best = value if self.best is None else max(self.best, value)

    @property
    def latest(self) -> float | None:
        return self.values[-1] if self.values else None


@attrs.define(kw_only=True)
class RunView:
    """The state behind the display; `update` takes every line of metrics as it is logged."""

    name: str
    directory: str
    """As a person would type it after `prl report`."""
    steps: int
    """Optimizer steps in all, the warm-up's included."""
    clock: Callable[[], float] = time.monotonic
    started: float = attrs.field(init=False)
    step: int = 0
    phase: str = "starting"
    metrics: dict[str, float] = attrs.field(factory=dict)
    """Latest value of everything that was logged."""
    reward: Curve = attrs.field(factory=Curve)
    speed: Curve = attrs.field(factory=Curve)
    accuracy: dict[str, Curve] = attrs.field(factory=dict)
    """Held-out accuracy by environment."""
    dropped: Counter[str] = attrs.field(factory=Counter)
    _left: tuple[float, float] | None = None
    """The last estimate of the seconds left, and when it was made."""

    def __attrs_post_init__(self) -> None:
        self.started = self.clock()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
        phase = phase_of(metrics)
        self.metrics.update(numbers)
        if phase == "eval":
            self._evaluated(numbers)
            return
        self.step, self.phase = max(self.step, step), phase
        self._trained(numbers)

    def _evaluated(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if name.startswith("eval/") and name.endswith("/accuracy"):
                environment = name.removeprefix("eval/").removesuffix("/accuracy")
                self.accuracy.setdefault(environment, Curve()).add(value)

    def _trained(self, metrics: Mapping[str, float]) -> None:
        if "reward/mean" in metrics:
            self.reward.add(metrics["reward/mean"])
        if self.phase == "rl" and "tokens/per_second" in metrics:
            self.speed.add(metrics["tokens/per_second"])
        if "progress/seconds_left" in metrics:
            self._left = (metrics["progress/seconds_left"], self.clock())
        for key in [k for k in self.metrics if k.startswith(_SHARE) and k not in metrics]:
            del self.metrics[key]  # a share that was not logged this time is 0, not what it was
        self.dropped.update({k.removeprefix(_DROPPED): int(v) for k, v in metrics.items() if k.startswith(_DROPPED)})

    @property
    def elapsed(self) -> float:
        return self.clock() - self.started

    @property
    def seconds_left(self) -> float | None:
        """The last estimate, minus the time since it was made."""
        if self._left is None:
            return None
        seconds, made = self._left
        return max(0.0, seconds - (self.clock() - made))

    @property
    def staleness_shares(self) -> dict[int, float]:
        """Staleness -> share of the last step's sampled tokens, ascending."""
        shares = {k.removeprefix(_SHARE): v for k, v in self.metrics.items() if k.startswith(_SHARE)}
        return {int(k): shares[k] for k in sorted((k for k in shares if k.isdigit()), key=int)}


def phase_of(metrics: Mapping[str, object]) -> str:
    """`warmup`, `rl` or `eval`."""
    return str(metrics.get("phase", "eval" if any(k.startswith("eval/") for k in metrics) else "rl"))
