"""Rollouts worth reading, from the two ends of a rollouts.jsonl of any length.

Only the ends are read, a few megabytes each, so a file of millions of lines costs no more than a small one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import attrs

WINDOW_BYTES = 2 << 20
WINDOW_LINES = 512
SHOWN = 3

Row: TypeAlias = dict[str, Any]


@attrs.frozen(kw_only=True)
class Sampled:
    """Rollouts of one end of a run: the best and the worst, of different tasks where possible."""

    title: str
    best: tuple[Row, ...]
    worst: tuple[Row, ...]


def sample(path: Path) -> list[Sampled]:
    """Rollouts of the beginning and of the end of a run; of the whole when it is short, nothing when there is none."""
    if not path.is_file():
        return []
    early, late = first_rows(path), last_rows(path)
    if path.stat().st_size <= WINDOW_BYTES:
        rows = _parsed(path.read_bytes().splitlines())
        if len(rows) <= 4 * SHOWN:
            return [_chosen("All", rows)] if rows else []
        part = max(2 * SHOWN, len(rows) // 10)
        early, late = rows[:part], rows[-part:]
    return [_chosen("Early", early), _chosen("Late", late[::-1])]


def first_rows(path: Path) -> list[Row]:
    with path.open("rb") as file:
        return _parsed(file.read(WINDOW_BYTES).splitlines()[:WINDOW_LINES])


def last_rows(path: Path) -> list[Row]:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - WINDOW_BYTES))
        return _parsed(file.read().splitlines()[-WINDOW_LINES:])


def _parsed(lines: Iterable[bytes]) -> list[Row]:
    """The lines that are whole: a window may begin inside one, and a dying run may end inside one."""
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _chosen(title: str, rows: Sequence[Row]) -> Sampled:
    """Of equal rewards those that come first in `rows`."""
    worst = _of_different_tasks(sorted(rows, key=_reward))
    others = [row for row in rows if not any(row is w for w in worst)]
    return Sampled(title=title, best=_of_different_tasks(sorted(others, key=_reward, reverse=True)), worst=worst)


def _reward(row: Row) -> float:
    return float(row["reward"])


def _of_different_tasks(rows: Iterable[Row]) -> tuple[Row, ...]:
    seen: set[str] = set()
    taken: list[Row] = []
    for row in rows:
        task = json.dumps(row.get("task"), sort_keys=True)
        if task not in seen and len(taken) < SHOWN:
            seen.add(task)
            taken.append(row)
    return tuple(taken)
