"""What the event log costs: bytes on disk and processor time per token, written and read.

    python -m benchmarks.event_log              from the root of a checkout; half a minute

Groups of 8 rollouts with token ids that are distributed like words of a text (Zipf, over a vocabulary of 151,936),
log-probabilities of such tokens, three policy versions, and the conversation as text. Times are processor time of one
thread, the best of three; writing includes encoding and deflating. Results go to benchmarks/results/event_log.json.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from prl.ledger import event_log, facts
from prl.ledger.event_log import EventLog
from prl.run_dir import RunDir
from prl.types import Group, Rollout, StopReason, TaskRef, Turn

RESULTS = Path(__file__).parent / "results" / "event_log.json"
VOCABULARY, MEMBERS, REPEATS = 151_936, 8, 3
CASES = {64: 400, 2_048: 40, 131_072: 2}
"""Tokens of a rollout -> groups."""


def rollout(name: str, length: int, random: np.random.Generator) -> Rollout:
    """A quarter of it prompt, the rest sampled by three versions, one after the other."""
    tokens = np.minimum(random.zipf(1.3, length), VOCABULARY) - 1
    prompt = length // 4
    sampled = np.arange(length) >= prompt
    versions = np.where(sampled, np.arange(length) * 3 // length, -1)
    text = " ".join(f"w{token:x}" for token in tokens)
    return Rollout(
        rollout_id=name,
        tokens=tokens.astype(np.int32),
        sampled=sampled,
        logprobs=np.where(sampled, -random.exponential(0.7, length), 0.0).astype(np.float32),
        versions=versions.astype(np.int32),
        temperature=1.0,
        turns=(Turn(start=prompt, end=length, stop=StopReason.STOP),),
        messages=({"role": "user", "content": text[: len(text) // 4]}, {"role": "assistant", "content": text}),
        reward=float(random.integers(2)),
        metrics={"accuracy": 1.0},
    )


def group(number: int, length: int, random: np.random.Generator) -> Group:
    return Group(
        group_id=number,
        task=TaskRef(environment="benchmark", split="train", index=number),
        attempt=0,
        started_version=0,
        rollouts=tuple(rollout(f"{number}.{member}", length, random) for member in range(MEMBERS)),
    )


def best(work: Callable[[], None]) -> float:
    """Seconds of processor time."""
    seconds = []
    for _ in range(REPEATS):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return min(seconds)


def measure(length: int, groups: int, folder: Path) -> dict[str, Any]:
    random = np.random.default_rng(length)
    run_dir = RunDir(folder)
    for path in (run_dir.config, run_dir.lock):
        path.write_text("")
    entries = [(0.0, facts.Arrived(group=group(number, length, random), admitted=True)) for number in range(groups)]
    tokens = groups * MEMBERS * length

    def write() -> None:
        log = EventLog(run_dir, "tokens")
        log.begin(1, 0.0)
        log.append(entries)
        log.close()

    path = event_log.path_of(run_dir, 1)
    written, read = best(write), best(lambda: sum(1 for _ in event_log.read(path)) and None)
    return {
        "tokens_per_rollout": length,
        "tokens": tokens,
        "bytes_per_token": round(path.stat().st_size / tokens, 2),
        "write_seconds_per_million_tokens": round(written / tokens * 1e6, 3),
        "read_seconds_per_million_tokens": round(read / tokens * 1e6, 3),
    }


def main() -> int:
    results = []
    for length, groups in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(length, groups, Path(folder)))
        print(json.dumps(results[-1]), flush=True)
    machine = {"cores": os.cpu_count(), "python": platform.python_version()}
    RESULTS.write_text(json.dumps({"machine": machine, "cases": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
