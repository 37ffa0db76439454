"""The run of benchmarks/vllm_gpu.py, watched from outside: its files, and the HTTP API of its engine."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import attrs
from prl.ledger.chain import manifest_digest
from prl.run_dir import RunDir, read_json
from prl.types import Manifest, TensorRecord

POLL_SECONDS = 0.5
WARM = 4
"""Steps at the start that count for nothing."""
ENDING_SECONDS = 20.0
"""That a run has for its last checkpoint, which is not measured here."""
READ_BACK_AT = 3
"""Steps before the last when the served weights are read back; those after it do not count either."""
MEDIANS = {
    "step_seconds": "time/step",
    "forward_backward_seconds": "time/forward_backward",
    "optimizer_seconds": "time/optimizer",
    "export_seconds": "time/export",
    "publish_seconds": "time/publish",
    "sampled_tokens_per_second": "tokens/per_second",
    "trainer_tokens_per_second_while_computing": "tokens/per_second_per_device",
    "mfu_while_computing": "mfu",
    "engine_idle": "idle/engine",
    "trainer_idle": "idle/trainer",
    "staleness_mean": "staleness/mean",
    "k3": "mismatch/k3",
    "k3_fresh": "mismatch/k3_fresh",
    "routes_replayed": "routes/replayed",
    "routes_differ": "routes/differ",
    "routes_differ_fresh": "routes/differ_fresh",
    "sampled_tokens_per_step": "tokens/sampled",
    "trained_tokens_per_step": "tokens/trained",
    "entropy": "entropy",
}
"""Figure -> metric of which it is the median over the steps that count."""


def watch(
    folder: Path, environment: Mapping[str, str], seconds: float, keep: Callable[[Mapping[str, Any]], None]
) -> None:
    """Launch folder/run.toml and watch it to its end, or for so long; `keep` is given what is known so far."""
    log = folder / "run.log"
    words = [sys.executable, "-m", "prl", "launch", str(folder / "run.toml")]
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=dict(environment))
    watched = Watched(RunDir(folder / "run"), folder / "model")
    deadline = time.monotonic() + seconds
    try:
        while process.poll() is None and time.monotonic() < deadline:
            watched.look()
            keep(watched.figures())
            if watched.done:
                deadline = min(deadline, time.monotonic() + ENDING_SECONDS)
            time.sleep(POLL_SECONDS)
        ended = "not waited for" if process.poll() is None else f"exit code {process.returncode}"
        keep({**watched.figures(), "ended": ended, "audit": _audit(watched.run, environment)})
    finally:
        _end(process, watched.run)


def _audit(run: RunDir, environment: Mapping[str, str]) -> str:
    """The last line of what `prl audit` says."""
    told = subprocess.run(
        [sys.executable, "-m", "prl", "audit", str(run.path)],
        capture_output=True,
        text=True,
        env=dict(environment),
        timeout=60,
    )
    lines = (told.stdout + told.stderr).strip().splitlines()
    return f"exit code {told.returncode}: {lines[-1] if lines else 'nothing said'}"


def _end(process: subprocess.Popen[bytes], run: RunDir) -> None:
    """The launcher's quick way; then whatever it started."""
    for _ in range(2):
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    process.kill()
    for started in read_json(run.path / "processes.json") or ():
        with suppress(ProcessLookupError, KeyError, TypeError):
            os.killpg(started["pid"], signal.SIGKILL)


@attrs.define(eq=False)
class Watched:
    """A run that goes on."""

    run: RunDir
    model: Path
    """The checkpoint it began with."""
    samples: list[dict[str, float]] = attrs.field(factory=list)
    """The engine's statistics, each with the time it was asked at."""
    read_back: dict[str, Any] = attrs.field(factory=dict)
    first_step: float = 0.0
    """Seconds from the launch to the first step's end."""
    launched: float = attrs.field(factory=time.monotonic)

    def look(self) -> None:
        """Once; what does not answer is looked at next time."""
        rows = self.rows()
        if rows and not self.first_step:
            self.first_step = time.monotonic() - self.launched
        with suppress(OSError, ValueError, KeyError, IndexError):
            self.samples.append({**self._ask("/statistics"), "at": time.monotonic(), "step": len(rows)})
            if not self.read_back and rows and len(rows) >= self._steps() - READ_BACK_AT:
                self.read_back = self._read_back()

    @property
    def done(self) -> bool:
        """All steps are."""
        return len(self.rows()) >= self._steps()

    def rows(self) -> list[dict[str, float]]:
        """Metrics of the steps so far."""
        if not self.run.metrics.is_file():
            return []
        lines = [json.loads(line) for line in self.run.metrics.read_text().splitlines() if line.endswith("}")]
        return [line for line in lines if line.get("phase") == "rl"]

    def figures(self) -> dict[str, Any]:
        """Medians and totals over the steps that count."""
        rows = self.rows()
        last = self._steps() - READ_BACK_AT
        counted = rows[WARM:last]
        figures: dict[str, Any] = {
            "steps": len(rows),
            "steps_counted": len(counted),
            "first_step_after": self.first_step,
        }
        figures["status"] = (read_json(self.run.state) or {}).get("status", "not begun")
        for name, metric in MEDIANS.items():
            if values := [row[metric] for row in counted if metric in row]:
                figures[name] = statistics.median(values)
        if counted:
            figures["staleness_max"] = max(row.get("staleness/max", 0) for row in counted)
        samples = [sample for sample in self.samples if WARM <= sample["step"] < last]
        if len(samples) > 1:
            figures |= _over_time(samples[0], samples[-1], counted)
        return {**figures, "read_back": self.read_back, "rows": rows}

    def _steps(self) -> int:
        return int((read_json(self.run.state) or {}).get("steps", 1 << 30))

    def _ask(self, path: str) -> Any:
        (url, *_) = (read_json(self.run.state) or {})["engines"]
        request = urllib.request.Request(url + path, headers={"Authorization": f"Bearer {self.run.token()}"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def _read_back(self) -> dict[str, Any]:
        """Every tensor that the engine serves, against the digest of what the trainer sent."""
        from prl.blocks.tensor_folder import StoredTensors

        started = time.monotonic()
        version = self._ask("/statistics")["version"]
        served = self._ask("/weights/checksums")
        if self._ask("/statistics")["version"] != version:
            return {}
        records = tuple(
            TensorRecord(
                name=name,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                offset=0,
                nbytes=tensor.nbytes,
                checksum=served.get(name, -1),
            )
            for name, tensor in StoredTensors(self.model).header().items()
        )
        manifest = Manifest.single(version=int(version), location="", tensors=records)
        with closing(sqlite3.connect(f"file:{self.run.ledger}?mode=ro", uri=True)) as ledger:
            (sent,) = ledger.execute("SELECT manifest FROM versions WHERE version = ?", (version,)).fetchone()
        return {
            "version": version,
            "tensors": len(served),
            "bytes": manifest.nbytes,
            "equal": manifest_digest(manifest) == sent,
            "seconds": time.monotonic() - started,
        }


def _over_time(first: Mapping[str, float], last: Mapping[str, float], rows: list[dict[str, float]]) -> dict[str, float]:
    """From the engine's totals."""
    seconds = last["at"] - first["at"]
    updates = last["updates"] - first["updates"]
    paused = last["update_seconds"] - first["update_seconds"]
    return {
        "window_seconds": seconds,
        "generated_tokens_per_second": (last["generated_tokens"] - first["generated_tokens"]) / seconds,
        "trained_tokens_per_second": sum(row.get("tokens/trained", 0.0) for row in rows)
        / sum(row.get("time/step", 0.0) for row in rows)
        if rows
        else 0.0,
        "updates": updates,
        "pause_seconds": paused / updates if updates else 0.0,
        "paused_share": paused / seconds,
        "preemptions": last["preemptions"],
    }
