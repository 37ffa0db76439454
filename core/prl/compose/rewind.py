"""A run's record goes back to the cut that it continues from, so that every step appears in it once.

Lines about steps after the cut, which will be trained again, are moved into the folder of the attempt that wrote them;
so are evaluations of the cut itself, which are done again, and a last line that a kill cut short. Called by
`prl.compose.resume` while no process of the run lives.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from prl.run_dir import RunDir


def rewind(run_dir: RunDir, step: int) -> None:
    """Set aside what the record knows beyond `step`, and remove what only a living run needs."""
    for path in (run_dir.metrics, run_dir.rollouts):
        if path.exists():
            _set_aside(path, step, aside=run_dir.logs() / path.name)
    for path in (run_dir.stop, run_dir.controller, run_dir.rendezvous, run_dir.processes):
        path.unlink(missing_ok=True)
    for folder in (*run_dir.checkpoints.glob("*.partial"), run_dir.beats):
        shutil.rmtree(folder, ignore_errors=True)


def _set_aside(path: Path, step: int, *, aside: Path) -> None:
    """Idempotent: killed half way, it leaves `path` as it was."""
    kept = path.with_name(f"{path.name}.partial")
    with path.open() as lines, kept.open("w") as stay, aside.open("w") as leave:
        for line in lines:
            (stay if _survives(line, step) else leave).write(line)
    kept.replace(path)


def _survives(line: str, step: int) -> bool:
    if not line.endswith("\n"):
        return False
    record = json.loads(line)
    evaluation: bool = record.get("phase") == "eval"
    about: int = record["step"]
    return about < step if evaluation else about <= step
