"""vLLM under prl on two GPUs of one host: hand-over of prompts, KV tiers, FP8, experts over copies, a real run.

    python -m benchmarks.vllm_two_gpus --out DIR              two GPUs of 80 GB, about nine minutes
    python -m benchmarks.vllm_two_gpus --out DIR --toy        what a CPU can do of it, with vLLM's CPU build

Parts, each in processes of its own with a time limit and a log in DIR; DIR/result.json is written as they go, and one
that fails costs no other. All but the runs go side by side: their seconds are those of a busy machine.

    kv          one plain server, tiers behind a cache, engines for prompts (GPU 0 for prompts, GPU 1 decodes), both
    routes      experts of prompts that were handed over, beside a plain server's and beside noise
    fp8         weights travel in FP8 blocks and are served in them; all are read back after two updates
    deep_gemm   the same with DeepGEMM's kernels
    experts     two copies of the attention, the experts divided over both GPUs: answers of both, before and after an
                update
    deepep      the same by each of vLLM's ways that DeepEP carries; where it is installed
    preflight   what the Slurm launcher asks of devices before a run: their health, a product on each, a sum over NCCL
    nccl        benchmarks/nccl_pair_gpu.py: the transport alone, and either side killed
    loop        benchmarks/vllm_gpu.py's run, trainer and vLLM on a GPU each (--weights: other transports, one run each)
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs

from benchmarks.vllm_gpu import ROOT, about

ASK = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""To ask whether there is a device must not open it: vLLM forks."""


@attrs.frozen(kw_only=True)
class Part:
    """One process, or one after the other until one ends well."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    limit: float
    """Seconds of each."""
    delay: float = 0.0
    """Seconds after the stage's begin."""
    environment: Mapping[str, str] = attrs.field(factory=dict)
    result: str = ""
    """File that holds what it found, under the folder."""


def stages(folder: Path, weights: Sequence[str], toy: bool) -> list[list[Part]]:
    """In the order of their worth."""

    def part(name: str, *variants: tuple[str, ...], limit: float = 300.0, **more: Any) -> Part:
        common = ("-m", "benchmarks.vllm_two_gpus_parts", name, "--out", str(folder), *(["--toy"] if toy else []))
        return Part(name=name, commands=tuple((*common, *words) for words in variants or ((),)), limit=limit, **more)

    def loop(transport: str, **more: Any) -> Part:
        out = folder / f"loop-{transport}"
        words = ("-m", "benchmarks.vllm_gpu", "--out", str(out), "--only", "export,run", "--weights", transport)
        sizes = ("--toy",) if toy else ("--two",)
        limit = 270.0
        return Part(
            name=f"loop-{transport}",
            commands=((*words, *sizes, "--seconds", str(limit - 5)),),
            limit=limit,
            result=f"{out.name}/result.json",
            **more,
        )

    second = {"CUDA_VISIBLE_DEVICES": "1"}
    alone = (
        []
        if toy
        else [
            part("fp8", environment=second),
            part("deep_gemm", environment=second, delay=90.0),
            part("experts"),
            *([part("deepep", limit=330.0)] if find_spec("deep_ep") else []),
            part("preflight", limit=120.0),
            Part(name="nccl", commands=(("-m", "benchmarks.nccl_pair_gpu", "--out", str(folder)),), limit=200.0),
        ]
    )
    routes = part("routes", ("--invariant",), (), limit=240.0)
    return [
        [part("kv", ("--invariant",), (), limit=330.0), routes, *alone],
        *[[loop(transport)] for transport in weights],
    ]


class Session:
    """What ran so far."""

    def __init__(self, folder: Path, ends: float) -> None:
        self.folder = folder
        self.ends = ends
        self.result: dict[str, Any] = {}
        self._lock = threading.Lock()

    def keep(self, name: str, figures: Any) -> None:
        with self._lock:
            self.result[name] = figures
            path = self.folder / "result.json"
            path.with_suffix(".partial").write_text(json.dumps(self.result, indent=1) + "\n")
            path.with_suffix(".partial").replace(path)

    def run(self, part: Part) -> None:
        time.sleep(part.delay)
        for number, command in enumerate(part.commands):
            started = time.monotonic()
            ended = self._process(part, command, number)
            file = self.folder / (part.result or f"{part.name}.json")
            found = json.loads(file.read_text()) if file.is_file() else {}
            seconds = round(time.monotonic() - started, 1)
            self.keep(part.name, {"found": found, "ended": ended, "seconds": seconds, "command": number})
            print(f"{part.name}: {ended}, {seconds} s", flush=True)
            if ended == "exit code 0":
                return

    def _process(self, part: Part, command: Sequence[str], number: int) -> str:
        """How it ended; with everything that it started."""
        limit = min(part.limit, self.ends - time.monotonic())
        if limit <= 0:
            return "no time was left to begin"
        places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        with (self.folder / f"{part.name}-{number}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": places, **ASK, **part.environment},
                cwd=ROOT,
                start_new_session=True,
            )
        try:
            return f"exit code {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            return "no time was left"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--seconds", type=float, default=3600.0, help="everything ends after so long")
    parser.add_argument("--weights", default="shared_memory", help="transports of the real run, one run each")
    parser.add_argument("--only", default="", help="parts, separated by commas")
    options = parser.parse_args()
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    session = Session(folder, time.monotonic() + options.seconds)
    session.keep("about", about())
    for stage in stages(folder, options.weights.split(","), options.toy):
        parts = [part for part in stage if not options.only or part.name in options.only.split(",")]
        threads = [threading.Thread(target=session.run, args=(part,)) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
