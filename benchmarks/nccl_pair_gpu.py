"""Transport `nccl` between two GPUs, without a run: seconds of a transfer, and what is left when one side is killed.

    python -m benchmarks.nccl_pair_gpu --out DIR              two GPUs; DIR/nccl.json
    python -m benchmarks.nccl_pair_gpu --out DIR --mb 64      on a CPU, over gloo

A trainer's rank on the first GPU and an engine's worker on the second, each a process of its own, over four gigabytes
of bfloat16 tensors. In the middle of a transfer first the worker is killed: the rank must live, and serve the next one.
Then the rank is killed: the worker must live, and say in time that the weights did not come.
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from prl.compose.compose import compose, create_run
from prl.errors import InfrastructureError
from prl.run_dir import RunDir
from prl_local.devices import found
from prl_nccl import NcclConfig
from prl_nccl.receiver import receive
from prl_nccl.sender import send
from torch import Tensor

from benchmarks.sides import Side, say
from benchmarks.vllm_gpu import ROOT

CONFIG = NcclConfig(deadline=10.0)
TENSORS = 32
ROUNDS = 4


def tensors(megabytes: int) -> Iterator[tuple[str, Tensor]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for index in range(TENSORS):
        yield f"tensor.{index}", torch.randn(megabytes * 500_000 // TENSORS, device=device).bfloat16()


def rank(run: Path, megabytes: int) -> None:
    """Publishes, and answers whoever asks whether it lives."""
    sender = send(CONFIG, run, 0)
    (run / "manifest").write_bytes(pickle.dumps(sender.send(0, tensors(megabytes))))
    for _ in _asked():
        say(alive=True)


def worker(run: Path, megabytes: int) -> None:
    """Fetches when it is told to."""
    del megabytes
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    manifest, receiver = pickle.loads((run / "manifest").read_bytes()), receive(CONFIG, run)
    for _ in _asked():
        started = time.perf_counter()
        try:
            content = dict(receiver.fetch(manifest))
            say(seconds=time.perf_counter() - started, tensors=len(content), bytes=manifest.nbytes)
        except InfrastructureError as error:
            say(seconds=time.perf_counter() - started, error=str(error)[:300])


def _asked() -> Iterator[str]:
    say(ready=True)
    yield from sys.stdin


class Answering(Side):
    """One of the two processes, ready."""

    def __init__(self, side: str, run: Path, megabytes: int, device: str) -> None:
        words = ["benchmarks.nccl_pair_gpu", "--out", str(run), "--mb", str(megabytes), "--side", side]
        super().__init__(words, device)
        self.heard()

    def ask(self) -> None:
        self.tell("go")

    def answer(self) -> dict[str, Any]:
        self.ask()
        return self.heard()


def measure(run: Path, megabytes: int) -> dict[str, Any]:
    first, second = ((*found(), "", "")[:2]) if len(found()) != 1 else (found()[0], found()[0])
    trainer = Answering("rank", run, megabytes, first)
    engine = Answering("worker", run, megabytes, second)
    rounds = [engine.answer() for _ in range(ROUNDS)]
    middle = 0.5 * statistics.median(one["seconds"] for one in rounds[1:])
    engine.ask()
    time.sleep(middle)
    engine.end()
    figures: dict[str, Any] = {"rounds": rounds, "after_the_worker_was_killed": [trainer.answer()]}
    engine = Answering("worker", run, megabytes, second)
    figures["after_the_worker_was_killed"].append(engine.answer())
    engine.ask()
    time.sleep(middle)
    trainer.end()
    figures["after_the_rank_was_killed"] = [engine.heard(), engine.answer()]
    engine.end()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--mb", type=int, default=4000, help="megabytes of weights")
    parser.add_argument("--side", choices=("rank", "worker"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        {"rank": rank, "worker": worker}[options.side](options.out, options.mb)
        return
    folder = options.out.resolve()
    config = ROOT / "configs" / "spell_backward.toml"
    run_dir: RunDir = create_run(
        compose(
            config, plugins="nccl", overrides=[f'run.dir="{folder / "nccl-run"}"', 'weights.type="nccl"'], probe=False
        ),
        config,
    )
    figures = measure(run_dir.path, options.mb)
    (folder / "nccl.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
