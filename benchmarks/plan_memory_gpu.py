"""Planned memory against measured memory on one GPU: the cases of train_gpu.py, layers not compiled.

    python benchmarks/plan_memory_gpu.py --out benchmarks/results/plan_memory_gpu.json    about two minutes
    python benchmarks/plan_memory_gpu.py --only qwen3                                      cases whose names contain it
    python benchmarks/plan_memory_gpu.py --smoke                                           tiny; on any machine

Planned is what `prl plan` computes (`prl.plan.memory`), from the model without data. Measured is the most that torch's
allocator handed out in the second and third step. Runs from a checkout with torch, numpy and attrs.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import train_gpu
from prl.plan.memory import Formats, Memory, Settings, memory
from prl.train.layout import Layout
from prl.train.survey import optimizer_bytes, optimizer_working, survey

SAMPLED = 7 / 8
"""Of a document's tokens, in train_gpu's batches."""
SKIPPED = ("transformers", "65k/8 documents")


def planned(case: train_gpu.Case) -> Memory:
    build = train_gpu.OPTIMIZERS[case.optimizer]
    per_byte, per_parameter = optimizer_bytes(build, torch.bfloat16)
    surveyed = survey(case.build, device="cuda", dtype=torch.bfloat16, float32=train_gpu.KEEP_FLOAT32)
    settings = Settings(
        layout=Layout(),
        formats=Formats(
            parameter=2,
            compute=2,
            optimizer=per_byte,
            optimizer_per_parameter=per_parameter,
            optimizer_working=optimizer_working(build, torch.bfloat16),
            serve=2,
        ),
        checkpointing=case.trainer.activation_checkpointing,
        recompute=case.trainer.recompute,
        optimizer_offload=False,
        activation_offload=case.trainer.activation_offload,
        logprob_chunk=case.trainer.logprob_chunk,
    )
    return memory(surveyed, settings, case.lengths, sampled=SAMPLED, accumulating=False)


def measured(case: train_gpu.Case) -> int:
    """Bytes."""
    step, _, _ = train_gpu.prl_steps(case)
    step(0)
    torch.cuda.reset_peak_memory_stats()
    for number in (1, 2):
        step(number)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def compare(case: train_gpu.Case) -> dict[str, Any]:
    started = time.perf_counter()
    plan = planned(case)
    row: dict[str, Any] = {
        "name": case.name,
        "planned_gib": plan.peak / 2**30,
        "phases_gib": {name: size / 2**30 for name, size in plan.phases.items()},
        "kept_gib": plan.kept / 2**30,
        "planning_seconds": time.perf_counter() - started,
    }
    if torch.cuda.is_available():
        row["measured_gib"] = measured(case) / 2**30
        row["difference"] = row["planned_gib"] / row["measured_gib"] - 1
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose names contain it")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for case in train_gpu.cases(arguments.smoke, False):
        if arguments.only not in case.name or any(skipped in case.name for skipped in SKIPPED):
            continue
        try:
            row = compare(case)
        except torch.OutOfMemoryError as error:
            row = {"name": case.name, "error": str(error).splitlines()[0]}
        rows.append(row)
        print(json.dumps(row), flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if arguments.out:
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
            document = {"torch": torch.__version__, "device": device, "results": rows}
            arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
