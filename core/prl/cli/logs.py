"""`prl logs [RUN] [ROLE[-INDEX]] [-f]`: the logs of a run's processes, each line after its process's name."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prl.cli.runs import add_run_argument, find_run, is_over, is_run
from prl.errors import UserError
from prl.run_dir import RunDir

POLL_SECONDS = 0.2


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("logs", help="what a run's processes wrote", description=__doc__)
    add_run_argument(parser)
    parser.add_argument("role", nargs="?", metavar="ROLE", help="only this role (engine) or process (engine-0)")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run is over")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    run_dir, role = _meant(arguments.directory, arguments.role)
    folder = run_dir.logs()
    if role and not _files(folder, role) and not arguments.follow:
        names = ", ".join(path.stem for path in _files(folder, None)) or "none"
        raise UserError(f"no process of {run_dir.path} matches {role!r}; there are logs of {names}")
    lines = follow(run_dir, role) if arguments.follow else Tail(folder, role).lines(last=True)
    for line in lines:
        print(line, flush=arguments.follow)
    return 0


def _meant(run: str | None, role: str | None) -> tuple[RunDir, str | None]:
    """A single word that is no run is a role of the newest run."""
    if run and role is None and not is_run(run):
        return find_run(None), run
    return find_run(run), role


class Tail:
    """What was added to a folder's logs since the last look."""

    def __init__(self, folder: Path, role: str | None) -> None:
        self._folder = folder
        self._role = role
        self._read: dict[Path, int] = {}

    def lines(self, *, last: bool = False) -> Iterator[str]:
        """Every complete new line, after its process's name; with `last`, what is not ended by a newline as well."""
        files = _files(self._folder, self._role)
        width = max((len(path.stem) for path in files), default=0)
        for path in files:
            for line in self._added(path, last=last):
                yield f"{path.stem:<{width}} | {line}"

    def _added(self, path: Path, *, last: bool) -> list[str]:
        with path.open("rb") as file:
            file.seek(self._read.get(path, 0))
            content = file.read()
        if not last:
            content = content[: content.rfind(b"\n") + 1]
        self._read[path] = self._read.get(path, 0) + len(content)
        return content.decode(errors="replace").splitlines()


def follow(run_dir: RunDir, role: str | None) -> Iterator[str]:
    """Lines as they are written, until the run is over."""
    tail = Tail(run_dir.logs(), role)
    while not is_over(run_dir):
        yield from tail.lines()
        time.sleep(POLL_SECONDS)
    yield from tail.lines(last=True)


def _files(folder: Path, role: str | None) -> list[Path]:
    """Logs of the role or the process, in the order of their names."""
    logs = sorted(folder.glob("*.log"))
    return [log for log in logs if role is None or log.stem == role or log.stem.rpartition("-")[0] == role]
