"""Every family on every mesh that two or four GPUs can form, against one rank: gradients over NCCL.

    python -m torch.distributed.run --nproc-per-node 2 -m benchmarks.meshes_gpu     from the root of a checkout

The comparison of tests/train/parallel, which runs on CPUs over gloo in the tests: toy models in float32, ragged
samples, a clipped step. Rank 0 prints the largest relative difference of each mesh's gradients; the exit code is 1 when
one is above BOUND.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from tests.train.parallel.mesh_program import compare_all

BOUND = 1e-5


def main() -> int:
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    with tempfile.TemporaryDirectory() as folder:
        compare_all(Path(folder), rank, device)
        largest = max(json.loads(path.read_text())["difference"] for path in Path(folder).glob("*.json"))
    dist.destroy_process_group()
    return 0 if largest < BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
