"""`failures.jsonl`: every process that died or hung, in which attempt, and what was done about it.

Whoever supervises appends, the controller of that attempt reads along (`prl.dispatch.casualties`) and `prl status` sums
up. The controller in turn condemns a process that answers and is of no use any more: a file beside its signs of life.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import attrs
import cattrs

from prl.run_dir import RunDir


@attrs.frozen(kw_only=True)
class Casualty:
    """One line."""

    attempt: int
    """The attempt that has to deal with it: the next one, where it ended its own."""
    role: str
    index: int
    pid: int
    """As the process itself knows it; -1 when it never gave a sign of life."""
    sentence: str
    done: str
    at: float
    """Seconds since the epoch, for people."""

    @property
    def name(self) -> str:
        return f"{self.role}-{self.index}"


def append(run_dir: RunDir, casualty: Casualty) -> None:
    with run_dir.failures.open("a") as file:
        file.write(f"{json.dumps(attrs.asdict(casualty))}\n")


class Reader:
    """What was appended since the last look; a line that is not whole yet waits for the next."""

    def __init__(self, run_dir: RunDir) -> None:
        self._path = run_dir.failures
        self._offset = 0

    def read(self) -> list[Casualty]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [cattrs.structure(json.loads(line), Casualty) for line in whole.splitlines()]


def summary(run_dir: RunDir) -> str:
    """How often each process failed, and what became of the last; empty where none did."""
    casualties = Reader(run_dir).read()
    if not casualties:
        return ""
    counts = Counter(casualty.name for casualty in casualties)
    last = casualties[-1]
    return (
        f"{', '.join(f'{name} {count}' for name, count in sorted(counts.items()))}; last: {last.sentence} ({last.done})"
    )


# --- what the controller asks for -------------------------------------------------------------------------------------
def condemn(run_dir: RunDir, name: str, reason: str) -> None:
    """Have a process of this run killed and restarted by whoever supervises it."""
    run_dir.beats.mkdir(exist_ok=True)
    partial = _sentence(run_dir, name).with_suffix(".partial")
    partial.write_text(reason)
    partial.replace(_sentence(run_dir, name))


def condemned(run_dir: RunDir, name: str) -> str:
    """Why the process is to be killed; empty when it is not. Asked once: the order is carried out by whoever asked."""
    try:
        reason = _sentence(run_dir, name).read_text()
    except FileNotFoundError:
        return ""
    _sentence(run_dir, name).unlink()
    return reason


def _sentence(run_dir: RunDir, name: str) -> Path:
    return run_dir.beats / f"{name}.condemned"
