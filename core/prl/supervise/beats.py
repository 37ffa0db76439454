"""Signs of life: every worker process rewrites a small file of its own, whoever supervises it reads them.

A file holds the process's id and a number that grows. The reader asks only whether the content changed since it last
looked, by its own monotonic clock: neither the wall clock nor another machine's matters, and a file system that many
hosts share is enough. A process that is stopped, swapped out for good or stuck with the interpreter's lock goes silent.
A thread gives these signs, whatever the rest of the process does; so the controller's event loop, in which a hook of a
plugin may never return, gives signs of its own while a run is under way.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import attrs

from prl.run_dir import RunDir

CONTROLLER_LOOP = "controller-loop"
"""The name under which the controller's event loop gives signs."""
BEAT_SECONDS = 0.5


class Beat:
    """The writing end, in the worker."""

    def __init__(self, run_dir: RunDir, name: str) -> None:
        run_dir.beats.mkdir(exist_ok=True)
        self._path = run_dir.beats / name
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
        self._count = 0

    def __call__(self) -> None:
        """One more sign. A disk that takes none is no reason to die: whoever waits for it will miss it."""
        self._count += 1
        with suppress(OSError):
            os.pwrite(self._file, f"{os.getpid():<10} {self._count:<20}\n".encode(), 0)

    def end(self) -> None:
        """From now on nobody is to wait for signs under this name."""
        os.close(self._file)
        self._path.unlink(missing_ok=True)


@attrs.define(kw_only=True)
class _Heard:
    content: bytes
    at: float


class Pulse:
    """The reading end: how long each process has been silent."""

    def __init__(self, run_dir: RunDir, *, clock: Callable[[], float]) -> None:
        self._folder = run_dir.beats
        self._clock = clock
        self._heard: dict[str, _Heard] = {}

    def expect(self, name: str) -> None:
        """A process of that name begins now; what it wrote in an earlier life counts for nothing."""
        self._heard[name] = _Heard(content=self._read(name), at=self._clock())

    def silent(self, name: str) -> float:
        """Seconds since the process gave a sign, or since it was first looked for."""
        content = self._read(name)
        heard = self._heard.get(name)
        if heard is None or content != heard.content:
            heard = self._heard[name] = _Heard(content=content, at=self._clock())
        return self._clock() - heard.at

    def pid(self, name: str) -> int:
        """Of the process that wrote last, on its own host; -1 when none did."""
        words = self._read(name).split()
        return int(words[0]) if len(words) == 2 and words[0].isdigit() else -1

    def names(self, prefix: str) -> list[str]:
        """Processes that ever gave a sign and whose name begins so."""
        return sorted(path.name for path in self._folder.glob(f"{prefix}*") if not path.suffix)

    def _read(self, name: str) -> bytes:
        try:
            return Path(self._folder, name).read_bytes()
        except FileNotFoundError:
            return b""
