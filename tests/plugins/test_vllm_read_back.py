"""Experts that vLLM's CPU backend has packed for its kernels are read back bit for bit, in every layout and dtype."""

from __future__ import annotations

import subprocess
import sys

from tests.plugins.served_vllm import needs_vllm

PROGRAM = """
import torch
from prl_vllm.inside.read_back import _unpack
from vllm._custom_ops import cpu_prepack_moe_weight

shape = torch.Size((8, 64, 32))
for isa in ("vec", "amx"):
    for dtype in (torch.float32, torch.bfloat16):
        loaded = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        try:
            kept = cpu_prepack_moe_weight(loaded.clone(), isa)
        except RuntimeError:
            continue  # a dtype that this kernel does not take
        assert not kept.equal(loaded), (isa, dtype)
        assert _unpack(kept, isa, shape).equal(loaded), (isa, dtype)
        print(isa, dtype)
"""


@needs_vllm
def test_packed_experts_come_back_as_they_were_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "vec torch.float32" in done.stdout
    assert "torch.bfloat16" in done.stdout
