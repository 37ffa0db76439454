"""Numbers as a person reads them, in few characters. Pure functions of their arguments."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

_BARS = "▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉"
MISSING = "-"


def duration(seconds: float | None) -> str:
    """Seconds in two units.

    Example:
        >>> duration(190), duration(7260), duration(4.2)
        ('3m10s', '2h01m', '4s')
    """
    if seconds is None:
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def count(value: float | None) -> str:
    """A quantity with a thousands suffix: 950, 12.3k, 4.0M."""
    if value is None:
        return MISSING
    for bound, divisor, suffix in ((1e3, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M")):
        if abs(value) < bound * 0.9995:
            return f"{value / divisor:.0f}" if not suffix else f"{value / divisor:.1f}{suffix}"
    return f"{value / 1e9:.1f}G"


def fixed(value: float | None, digits: int = 2) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def small(value: float | None) -> str:
    """A number whose order of magnitude is what matters: 3.1e-12, 0."""
    if value is None:
        return MISSING
    return f"{value:.1e}" if value else "0"


def percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.0f}%"


def sparkline(values: Sequence[float], width: int, *, floor: float | None = None) -> str:
    """The values as bars, averaged into at most `width` characters; the scale starts at `floor` or their minimum."""
    if not values or width <= 0:
        return ""
    cells = min(width, len(values))
    edges = [round(i * len(values) / cells) for i in range(cells + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means) if floor is None else floor, max(means)
    span = (high - low) or 1.0
    return "".join(_BARS[min(7, int(8 * (m - low) / span))] for m in means)


def bar(share: float, width: int) -> str:
    """A horizontal bar of `share` of `width` characters, in eighths of a character.

    Example:
        >>> bar(0.5, 4), bar(0.01, 4)
        ('██', '▏')
    """
    eighths = round(min(max(share, 0.0), 1.0) * width * 8) or (1 if share > 0 else 0)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def tally(counts: Mapping[str, int]) -> str:
    """`stale 2, zero_variance 1`: the most frequent first."""
    return ", ".join(f"{name} {n}" for name, n in sorted(counts.items(), key=lambda item: -item[1]) if n)
