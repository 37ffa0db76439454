"""The run directory: everything a run is lies in one folder.

run.toml            resolved config; `prl launch <dir>/run.toml` repeats the run
plugins.lock        plugins, versions and source digests every process must see
token               the run's secret (mode 0600): every endpoint asks for it
controller.json     where the controller listens
rendezvous.json     where the store of a trainer on several nodes listens
resume.json         from the second attempt on: which of its checkpoints it goes on from, on how many trainer nodes
chain.json          which run it follows, where it was launched after one
claim               locked by whoever launches or resumes the run, as long as that lasts
launch.json         which launcher keeps the run, and what it calls it, where one took it over (slurm)
processes.json      what the launcher started: role, index, pid, host, log
state.json          status, step, version, last error: rewritten as the run goes
failures.jsonl      every process that died or hung, and what was done about it
beats/              signs of life, one file per process
stop                present when the run was asked to stop
logs/attempt-N/     one file per process
metrics.jsonl       one line per step and per evaluation
rollouts.jsonl      one line per trained rollout
columns/            columns too large for a message, until they are trained
ledger.sqlite       every prompt, batch, version and failure (`prl audit`, `prl explain`)
events/             the event log: what arrived and when, one file per launch (`prl replay`)
serving/            where `prl serve` works, while it does
replay/             where `prl replay` works; a run directory of its own
checkpoints/step-N/
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

import attrs

from prl.errors import UserError

SUPERVISOR = "launcher"
"""Role, in processes.json, of the process that starts the others; listed where none of them is."""


def _absolute(path: str | Path) -> Path:
    return Path(path).resolve()


@attrs.frozen
class RunDir:
    """Names of the files of a run, and atomic writes into it."""

    path: Path = attrs.field(converter=_absolute)

    @classmethod
    def existing(cls, path: str | Path) -> RunDir:
        """The directory of a run that was launched; UserError when it is not one."""
        run = cls(path)
        if not run.config.is_file():
            raise UserError(f"{path} is not a run directory: it has no run.toml")
        return run

    @property
    def config(self) -> Path:
        return self.path / "run.toml"

    @property
    def lock(self) -> Path:
        return self.path / "plugins.lock"

    @property
    def claim(self) -> Path:
        return self.path / "claim"

    @property
    def resume(self) -> Path:
        return self.path / "resume.json"

    @property
    def controller(self) -> Path:
        return self.path / "controller.json"

    @property
    def rendezvous(self) -> Path:
        return self.path / "rendezvous.json"

    @property
    def chain(self) -> Path:
        return self.path / "chain.json"

    @property
    def launch(self) -> Path:
        return self.path / "launch.json"

    @property
    def processes(self) -> Path:
        return self.path / "processes.json"

    @property
    def state(self) -> Path:
        return self.path / "state.json"

    @property
    def failures(self) -> Path:
        return self.path / "failures.jsonl"

    @property
    def beats(self) -> Path:
        return self.path / "beats"

    @property
    def stop(self) -> Path:
        return self.path / "stop"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts.jsonl"

    @property
    def columns(self) -> Path:
        return self.path / "columns"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.sqlite"

    @property
    def events(self) -> Path:
        return self.path / "events"

    @property
    def replay(self) -> Path:
        return self.path / "replay"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def logs(self, attempt: int | None = None) -> Path:
        """Folder of an attempt's logs; the newest attempt by default."""
        return self.path / "logs" / f"attempt-{attempt or max(self.attempts(), default=1)}"

    def attempts(self) -> list[int]:
        """Numbers of the attempts so far, ascending."""
        return sorted(int(p.name.removeprefix("attempt-")) for p in (self.path / "logs").glob("attempt-*"))

    def create_token(self) -> None:
        """Write the run's secret, readable by its owner only."""
        descriptor = os.open(self.path / "token", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))

    def token(self) -> str:
        return (self.path / "token").read_text()

    def write_json(self, path: Path, value: Any) -> None:
        """Replace `path` atomically: a reader sees the old file or the new one."""
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(value, indent=1))
        partial.replace(path)


def read_json(path: Path) -> Any:
    """The JSON in `path`, or None when the file is not there."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
