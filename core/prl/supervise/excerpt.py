"""The lines of a log that say why its process ended."""

from __future__ import annotations

from pathlib import Path

TRACEBACK = "Traceback (most recent call last):"
LINES = 8
TAIL_BYTES = 64 << 10


def excerpt(log: Path) -> str:
    """What the last traceback ends in, with the frame that raised; without one, the last lines. Indented."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    chosen = _after_traceback(lines) or lines[-LINES:] or ["(it wrote nothing)"]
    return "\n".join(f"    {line}" for line in chosen)


def _after_traceback(lines: list[str]) -> list[str]:
    starts = [index for index, line in enumerate(lines) if TRACEBACK in line]
    if not starts:
        return []
    # Inside an exception group every line has a margin of "    | ", as wide as what stands before the word Traceback.
    margin = lines[starts[-1]].index(TRACEBACK)
    below = [line[margin:] for line in lines[starts[-1] + 1 :] if line[margin:].strip("- ")]
    error = next((index for index, line in enumerate(below) if not line.startswith(" ")), len(below))
    frame = [index for index, line in enumerate(below[:error]) if line.lstrip().startswith("File ")][-1:]
    return [*(below[index].strip() for index in frame), *below[error : error + LINES]]
