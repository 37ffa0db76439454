"""Versions through host memory and through the GPU's own: seconds of both, and what a damaged or lost sender does.

    python -m benchmarks.shared_memory_gpu --out DIR             8.3 GB on one GPU of 80 GB or two, 80 seconds
    python -m benchmarks.shared_memory_gpu --out DIR --gb 0.02   on a CPU: the host's way alone

The two sides of benchmarks/weight_transports_gpu.py, a trainer's rank and an engine's worker, on two GPUs and then on
one. `write` is the rank's part of an update, `update` the worker's: copied, verified, staged on its device and kept in
host memory. `right`: what it serves then has the checksums that the rank computed. Afterwards a byte of what waits is
changed; the rank is killed within an update and before another, and a new one takes its place.
DIR/shared_memory.json is written as results come.
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path
from typing import Any

from prl.compose.compose import compose, create_run
from prl_local.devices import found

from benchmarks.vllm_gpu import ROOT
from benchmarks.weight_transports_gpu import GIGABYTES, Asked, Report

HOST, DEVICE = "shared_memory", "shared_memory, device"


class Pair:
    """A rank and a worker."""

    def __init__(self, run: Path, gigabytes: float, devices: tuple[str, str]) -> None:
        self._rank = run, gigabytes, devices[0]
        self.rank, self.worker = Asked("rank", run, gigabytes, devices[0]), Asked("worker", run, gigabytes, devices[1])
        for side in (self.rank, self.worker):
            side.heard()

    def update(self, transport: str, version: int) -> dict[str, Any]:
        started = time.perf_counter()
        answer = self.worker.ask("update", transport=transport, version=version, staging="device", part="all")
        return {**answer, "seconds": time.perf_counter() - started}

    def round(self, transport: str, version: int) -> dict[str, Any]:
        return {
            "write": self.rank.ask("send", transport=transport, version=version),
            "update": self.update(transport, version),
        }

    def another_rank(self) -> None:
        self.rank.end()
        run, gigabytes, device = self._rank
        self.rank = Asked("rank", run, gigabytes, device)
        self.rank.heard()

    def killed_within(self, seconds: float, version: int) -> dict[str, Any]:
        """The rank is killed so long after an update began."""
        timer = threading.Timer(seconds, self.rank.end)
        timer.start()
        answer = self.update(DEVICE, version)
        timer.join()
        return answer

    def end(self) -> None:
        self.rank.end()
        self.worker.end()


def measure(run: Path, gigabytes: float, report: Report) -> None:
    gpus = found()
    peers = Pair(run, gigabytes, (gpus[0], gpus[-1]) if gpus else ("", ""))
    try:
        if gpus:
            device(peers, report)
            lost(peers, report)
        report.add("host", [peers.round(HOST, version) for version in range(2)])
    finally:
        peers.end()
    if len(gpus) > 1:
        alone = Pair(run, gigabytes, (gpus[0], gpus[0]))
        try:
            report.add("device, one GPU", [alone.round(DEVICE, version) for version in range(2)])
        finally:
            alone.end()


def device(pair: Pair, report: Report) -> None:
    report.add("device", [pair.round(DEVICE, version) for version in range(3)])
    report.add("version gone", pair.update(DEVICE, 0))
    report.add("memory", {"rank": pair.rank.ask("memory"), "worker": pair.worker.ask("memory")})
    pair.rank.ask("damage", transport=DEVICE, version=2)
    report.add("damaged", pair.update(DEVICE, 2))
    report.add("after damage", pair.round(DEVICE, 3))


def lost(pair: Pair, report: Report) -> None:
    report.add("killed within an update", pair.killed_within(0.3, 3))
    report.add("killed before", pair.update(DEVICE, 3))
    pair.another_rank()
    report.add("another rank", pair.round(DEVICE, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--gb", type=float, default=GIGABYTES, help="gigabytes of weights")
    options = parser.parse_args()
    folder = options.out.resolve()
    config = ROOT / "configs" / "spell_backward.toml"
    run_dir = create_run(compose(config, overrides=[f'run.dir="{folder / "segments-run"}"'], probe=False), config)
    measure(run_dir.path, options.gb, Report(folder / "shared_memory.json"))


if __name__ == "__main__":
    main()
