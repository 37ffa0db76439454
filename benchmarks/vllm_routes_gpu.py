"""Experts of tokens whose keys and values left a GPU's cache for host memory or disk and came back.

    python -m benchmarks.vllm_routes_gpu --out DIR            one GPU of 80 GB or two, about three minutes
    python -m benchmarks.vllm_routes_gpu --out DIR --toy      on a CPU, with vLLM's CPU build

The same prompts, one at a time and greedily, go twice to each of: a plain server with room for all of them; one whose
cache is too small, with host memory behind it; one with less of it and a disk; with two GPUs also an engine that
samples what another one computed, both with host memory. All compute the same numbers of tokens in the same order, so
that tokens and experts must be those of the plain server to the bit; where a prompt is handed over, its last token is
computed in a step of its own, and what is sampled may differ by rounding. Then the weights change, and all is asked
once more. DIR/routes.json is written as results come.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from prl.types import Completion
from prl_local.devices import found

from benchmarks.vllm_two_gpus_fleet import Fleet
from benchmarks.vllm_two_gpus_parts import GPU, TOY, Job, Report, Sizes
from tests.plugins.served_vllm import Background

MOVED = ("outside_hit_tokens", "fetched_bytes", "host_written_bytes", "host_read_bytes", "disk_read_bytes")
ROUTED = 'trainer.router_replay="on"'


def layouts(job: Job, devices: int) -> dict[str, Sequence[str]]:
    """Name -> edits of the config."""
    small = job.sizes.small
    cache = (ROUTED, f"engine.kv_cache_bytes={small}")
    host = (*cache, f"engine.kv_tiers.host_bytes={4 * small}")
    disk = (f"engine.kv_tiers.host_bytes={small // 2}", f'engine.kv_tiers.disk="{job.folder / "kv"}"')
    handed = ("engine.count=2", "engine.prefill.count=1")
    return {
        "plain": (ROUTED,),
        "host": host,
        "host and disk": (*cache, *disk),
        **({"handed over, host": (*host, *handed)} if devices > 1 else {}),
    }


def ask(fleet: Fleet, prompts: Sequence[list[int]]) -> tuple[list[Completion], dict[str, float]]:
    """One after the other; (completions, what moved meanwhile)."""
    engine = fleet.engines[-1]
    before = _moved(fleet)
    completions = [engine.routed(prompt, temperature=0.0, max_tokens=16)[0] for prompt in prompts]
    return completions, {name: value - before[name] for name, value in _moved(fleet).items()}


def _moved(fleet: Fleet) -> dict[str, float]:
    every = [engine.statistics() for engine in fleet.engines]
    return {name: sum(one[name] for one in every) for name in MOVED}


def compared(
    prompts: Sequence[list[int]], ours: Sequence[Completion], theirs: Sequence[Completion]
) -> Mapping[str, float]:
    """Completions and routes that are equal; the experts of a token in their order."""
    figures: dict[str, float] = dict.fromkeys(("rows", "rows_equal", "prompt_rows", "prompt_rows_equal"), 0)
    for prompt, one, other in zip(prompts, ours, theirs, strict=True):
        assert one.routes is not None
        assert other.routes is not None
        assert len(one.routes.experts) == len(other.routes.experts) == len(prompt) + len(one.tokens) - 1
        equal = (one.routes.experts == other.routes.experts).all((1, 2))
        figures["rows"] += len(equal)
        figures["rows_equal"] += int(equal.sum())
        figures["prompt_rows"] += len(prompt)
        figures["prompt_rows_equal"] += int(equal[: len(prompt)].sum())
    pairs = list(zip(ours, theirs, strict=True))
    same = [(one, other) for one, other in pairs if one.tokens.tolist() == other.tokens.tolist()]
    gaps = [float(np.abs(one.logprobs - other.logprobs).max()) for one, other in same]
    return {"completions": len(pairs), "tokens_equal": len(same), "logprob_gap": max(gaps, default=0.0), **figures}


def routes(job: Job, devices: int) -> None:
    sizes: Sizes = job.sizes
    chosen = layouts(job, devices)
    with job.up(chosen) as fleets:
        count, turn = (10, sizes.talk.turn) if sizes is GPU else (7, 530)
        prompts = fleets["plain"].engines[0].prompts(*[turn + 7 * i for i in range(count)], seed=4)
        job.report.add(prompt_tokens=sum(map(len, prompts)), small_cache_bytes=sizes.small)
        for version in (0, 1):
            with ThreadPoolExecutor() as threads:
                list(threads.map(Fleet.publish, fleets.values(), repeat(version), repeat(1 + version)))
            passes = 2 if version == 0 else 1
            plain = [ask(fleets["plain"], prompts)[0] for _ in range(passes)]
            for name, fleet in fleets.items():
                try:
                    rows = _layout(fleet, prompts, plain)
                except Exception as error:  # one layout that fails leaves the others
                    traceback.print_exc()
                    rows = {"error": f"{type(error).__name__}: {error}"[:600]}
                job.report.add(**{f"version {version}, {name}": rows})


def _layout(fleet: Fleet, prompts: Sequence[list[int]], plain: Sequence[list[Completion]]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    before: list[Completion] | None = None
    for number, expected in enumerate(plain):
        answers, moved = ask(fleet, prompts)
        rows[f"pass {number}"] = {"moved": moved, "beside plain": compared(prompts, answers, expected)}
        if before is not None:
            rows["beside its own first pass"] = compared(prompts, answers, before)
        before = answers
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(folder / "routes.json")
    sizes = TOY if options.toy else GPU
    job = Job(name="routes", folder=folder, sizes=sizes, invariant=False, report=report, background=Background())
    return report.exit_code(lambda: routes(job, len(found())))


if __name__ == "__main__":
    sys.exit(main())
