"""`prl status [RUN]`: how far a run is, its last metrics, and which of its processes live."""

from __future__ import annotations

import argparse
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prl.cli.runs import FINAL, add_run_argument, alive, find_run, is_over, remote, state_of
from prl.cli.table import columns
from prl.run_dir import RunDir, read_json
from prl.supervise import casualties

SHOWN = ("reward/mean", "accuracy/mean", "staleness/mean", "mismatch/k3", "tokens/per_second", "progress/seconds_left")
"""Metrics worth a line; evaluations are shown as well."""


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("status", help="how a run is doing", description=__doc__)
    add_run_argument(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    print(summary(find_run(arguments.directory)))
    return 0


def summary(run_dir: RunDir) -> str:
    """State, metrics and processes of a run, as text."""
    state = state_of(run_dir)
    parts = [f"{run_dir.path}\n{columns(_progress(state, run_dir))}"]
    metrics = _metrics(state)
    if metrics:
        parts.append(f"last metrics\n{columns(metrics)}")
    processes = [_process(process, run_dir) for process in read_json(run_dir.processes) or ()]
    if processes:
        parts.append(f"processes\n{columns(processes)}")
    return "\n\n".join(parts)


def _progress(state: Mapping[str, Any], run_dir: RunDir) -> list[list[str]]:
    status = state["status"]
    if status not in FINAL and is_over(run_dir):
        status = f"{status} (but none of its processes is alive: it was killed)"
    elif status not in FINAL and run_dir.stop.exists():
        status = f"{status} (asked to stop)"
    rows = [["status", status]]
    there = remote(run_dir)
    rows += [] if there is None else there.rows()
    if "step" in state:
        rows.append(["step", f"{state['step']} of {state.get('steps', '?')}, version {state.get('version', 0)}"])
    if state.get("updated"):
        rows.append(["updated", f"{max(0, round(time.time() - state['updated']))} s ago"])
    if state.get("engines") and not is_over(run_dir):
        rows.append(["engines", ", ".join(f"{url}/v1" for url in state["engines"])])
        rows.append(["", f"OpenAI's API; the key is in {run_dir.path / 'token'}"])
    if state.get("error"):
        rows.append(["error", str(state["error"])])
    rows += [["last failure", failure]] if (failure := _last_failure(run_dir)) else []
    rows += [["restarts", restarts]] if (restarts := casualties.summary(run_dir)) else []
    return rows


def _last_failure(run_dir: RunDir) -> str:
    from prl.ledger.read import last_failure

    return last_failure(run_dir.ledger)


def _metrics(state: Mapping[str, Any]) -> list[list[str]]:
    metrics = state.get("metrics") or {}
    names = [name for name in metrics if name in SHOWN or name.startswith("eval/")]
    return [[name, f"{metrics[name]:.4g}"] for name in names if isinstance(metrics[name], int | float)]


def _process(process: Mapping[str, Any], run_dir: RunDir) -> list[str]:
    life = "alive" if alive(process, run_dir) else "gone"
    if remote(run_dir) is not None:
        life = "gone" if is_over(run_dir) else "in the job"
    elif process["host"] != socket.gethostname():
        life = "elsewhere"
    log = Path(process["log"])
    shown = log.relative_to(run_dir.path) if log.is_relative_to(run_dir.path) else log
    return [f"{process['role']}-{process['index']}", f"pid {process['pid']}", process["host"], life, str(shown)]
