"""`select_topk` by the plugin `packed_topk` and by the reference, a stable sort: CPU-milliseconds, or a device's.

    python -m benchmarks.packed_topk [--device cuda]

Scores are as an indexer's are: a fifth of them exactly 0, and the last tokens not to be seen. Both must give the same.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from prl.blocks.dsa import select_topk
from prl_packed_topk.kernel import select_topk as packed
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
CASES = ((64, 1024, 128), (64, 4096, 2048), (16, 32_768, 2048), (8, 131_072, 2048))
"""(queries, tokens before them, tokens to select)"""
REPEATS = 5


def scores(queries: int, tokens: int, device: str) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(queries, tokens, generator=draw)
    values = torch.where(torch.rand(queries, tokens, generator=draw) < 0.2, 0.0, values)
    values[:, -tokens // 16 :] = float("-inf")
    return values.to(device)


def milliseconds(call: Callable[[], Tensor], device: str) -> float:
    """The best of some: other load only ever slows."""
    best = float("inf")
    for _ in range(REPEATS):
        if device == "cpu":
            started = time.process_time()
            call()
            taken = time.process_time() - started
        else:
            torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            torch.cuda.synchronize()
            taken = time.perf_counter() - started
        best = min(best, taken)
    return 1e3 * best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = parser.parse_args().device
    torch.set_num_threads(1)
    rows = []
    for queries, tokens, count in CASES:
        given = scores(queries, tokens, device)
        assert torch.equal(packed(given, count), select_topk.reference(given, count))
        row = {
            "queries": queries,
            "tokens": tokens,
            "count": count,
            "reference_ms": milliseconds(lambda g=given, c=count: select_topk.reference(g, c), device),
            "packed_ms": milliseconds(lambda g=given, c=count: packed(g, c), device),
        }
        rows.append(row)
        print(", ".join(f"{name} {value:.2f}" if "ms" in name else f"{name} {value}" for name, value in row.items()))
    name = "cpu" if device == "cpu" else torch.cuda.get_device_name()
    file = RESULTS / f"packed_topk_{device}.json"
    file.write_text(json.dumps({"device": name, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
