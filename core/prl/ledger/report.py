"""What an audit comes to: checks that pass or fail with their numbers, the bias of what was dropped, and the limits."""

from __future__ import annotations

from collections.abc import Iterable

import attrs


@attrs.frozen(kw_only=True)
class Check:
    """One claim about a run."""

    name: str
    claim: str
    numbers: str
    problems: tuple[str, ...] = ()
    """Everything that contradicts the claim, a sentence each."""

    @property
    def passed(self) -> bool:
        return not self.problems


@attrs.frozen(kw_only=True)
class Share:
    """Attempts at groups that came to the same end, in one environment (or all)."""

    end: str
    """`trained`, `dropped: <reason>` or `given up`."""
    environment: str
    attempts: int
    rollouts: int
    """Of them, those whose length and reward are known: the attempts that arrived."""
    length: float | None
    reward: float | None
    seconds: float | None
    """Mean time from dispatch to arrival or end."""


@attrs.frozen(kw_only=True)
class Audit:
    """All of it; `passed` when every check does."""

    run: str
    launches: tuple[str, ...]
    checks: tuple[Check, ...]
    bias: tuple[Share, ...]
    unproven: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def plural(count: int, noun: str) -> str:
    """`1 group`, `2 groups`, `3 batches`."""
    ending = "" if count == 1 else "es" if noun.endswith(("ch", "s")) else "s"
    return f"{count:,} {noun}{ending}"


def spans(numbers: Iterable[int]) -> str:
    """Ascending numbers in short: `1-3, 7`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
