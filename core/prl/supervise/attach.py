"""`python -m prl.supervise.attach RUN PROCESS [--stacks | -c COMMAND]`: beside a process of a run, where that runs.

Becomes a shell with the process's environment and working directory, and PRL_RUN, PRL_PROCESS and PRL_PID; or asks the
process where every thread of its stands (`prl.worker` answers SIGUSR2, whatever it is at). Started by `prl attach`, by
way of the run's launcher. Knows the process by its signs of life, for its launcher may know no more than a wrapper.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import attrs

from prl.errors import InfrastructureError, PrlError
from prl.run_dir import RunDir
from prl.supervise.beats import Pulse

STACKS = signal.SIGUSR2
_ANSWER_SECONDS = 10.0
_POLL_SECONDS = 0.1


def arguments(run_dir: RunDir, process: str, *, stacks: bool, command: str) -> list[str]:
    """What follows a Python on the process's host."""
    words = ["-m", "prl.supervise.attach", str(run_dir.path), process]
    return [*words, *(["--stacks"] if stacks else []), *(["-c", command] if command else [])]


def stacks_file(run_dir: RunDir, name: str) -> Path:
    """Where a process says where its threads stand."""
    return run_dir.beats / f"{name}.stacks"


@attrs.frozen(kw_only=True)
class Neighbour:
    """A process of the run that lives on this host."""

    name: str
    pid: int

    @property
    def _proc(self) -> Path:
        return Path("/proc", str(self.pid))

    @classmethod
    def find(cls, run_dir: RunDir, name: str) -> Neighbour | None:
        """By its signs of life; None where that process is gone, lives on another host, or this host hides it."""
        found = cls(name=name, pid=Pulse(run_dir, clock=time.monotonic).pid(name))
        try:
            return found if found._is_of(run_dir) else None
        except OSError:
            return None

    def _is_of(self, run_dir: RunDir) -> bool:
        """Whether what has that id here is the process: another host's may have the same."""
        role, _, index = self.name.rpartition("-")
        words = (self._proc / "cmdline").read_text(errors="surrogateescape").split("\0")
        asked = dict(pairwise(words))
        own = self.environment().get("RANK") if role == "trainer-rank" else asked.get("--index")
        return (asked.get("--run"), asked.get("--role"), own) == (str(run_dir.path), role, index)

    def environment(self) -> dict[str, str]:
        pairs = (self._proc / "environ").read_bytes().decode(errors="surrogateescape").split("\0")
        return {name: value for name, _, value in (pair.partition("=") for pair in pairs) if name}

    def folder(self) -> str:
        return os.readlink(self._proc / "cwd")


def main(words: list[str]) -> int:
    """Does not return where it becomes a shell."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=RunDir)
    parser.add_argument("process")
    parser.add_argument("--stacks", action="store_true")
    parser.add_argument("-c", dest="command", default="")
    asked = parser.parse_args(words)
    try:
        if asked.stacks:
            print(stacks(asked.run, asked.process))
            return 0
        become_shell(asked.run, asked.process, asked.command)
    except PrlError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    raise AssertionError("a shell took this process's place")


# --- a shell ----------------------------------------------------------------------------------------------------------
def become_shell(run_dir: RunDir, process: str, command: str) -> None:
    """In the process's environment; in this one's own, saying so, where there is no such process."""
    neighbour = Neighbour.find(run_dir, process)
    environment: Mapping[str, str] = os.environ
    if neighbour is None:
        print(f"{process} does not live here: this is a shell where it ran", file=sys.stderr)
    else:
        environment = neighbour.environment()
        os.chdir(neighbour.folder())
    shell = os.environ.get("SHELL", "/bin/sh")
    ours = {"PRL_RUN": str(run_dir.path), "PRL_PROCESS": process, "PRL_PID": str(neighbour.pid if neighbour else "")}
    terminal = {"TERM": os.environ["TERM"]} if "TERM" in os.environ else {}
    os.execve(shell, [shell, *(["-c", command] if command else [])], {**environment, **terminal, **ours})


# --- stacks -----------------------------------------------------------------------------------------------------------
def stacks(run_dir: RunDir, process: str) -> str:
    """Of the process, and of the ranks that a trainer's agent has on this host."""
    pulse = Pulse(run_dir, clock=time.monotonic)
    ranks = pulse.names("trainer-rank-") if process.rpartition("-")[0] == "trainer" else []
    found = [neighbour for name in (process, *ranks) if (neighbour := Neighbour.find(run_dir, name))]
    if not found:
        raise InfrastructureError(f"{process} does not live here; prl status says what became of it")
    return "\n".join(f"--- {each.name} (pid {each.pid})\n{_ask(run_dir, each)}" for each in found)


def _ask(run_dir: RunDir, neighbour: Neighbour) -> str:
    """The handler writes everything at once: an answer that grows no more is whole."""
    file = stacks_file(run_dir, neighbour.name)
    before = file.stat().st_size
    os.kill(neighbour.pid, STACKS)
    deadline = time.monotonic() + _ANSWER_SECONDS
    size = _settled(lambda: file.stat().st_size, before, deadline)
    if size == before:
        return f"no answer within {_ANSWER_SECONDS:.0f} s: the process is stopped, or waits for a disk"
    with file.open("rb") as answer:
        answer.seek(before)
        return answer.read(size - before).decode(errors="replace").rstrip()


def _settled(size: Callable[[], int], before: int, deadline: float) -> int:
    last = before
    while time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        now = size()
        if now == last != before:
            break
        last = now
    return last


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
