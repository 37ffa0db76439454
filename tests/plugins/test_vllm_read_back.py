"""What a worker serves of a tensor is read back; experts that vLLM's CPU backend packs come back as they were."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from prl_vllm.inside.read_back import Placed, _read
from torch import Tensor, nn

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


# --- one worker's part ------------------------------------------------------------------------------------------------
SENT = torch.arange(24.0).reshape(6, 4) / 8


def rows(first: int, count: int) -> Callable[[Tensor, Tensor], None]:
    def load(parameter: Tensor, tensor: Tensor) -> None:
        parameter[:count].copy_(tensor[first : first + count])

    return load


def columns(parameter: Tensor, tensor: Tensor) -> None:
    parameter.copy_(tensor[:, 2:])


def elsewhere(parameter: Tensor, tensor: Tensor) -> bool:
    return False


def decay(parameter: Tensor, tensor: Tensor) -> None:
    parameter.copy_(-torch.exp(tensor.float()))


def served(load: Callable[[Tensor, Tensor], object], *shape: int, change: float = 0.0) -> Placed:
    """What a loader makes of the sent tensor, its last element changed."""
    layer = nn.Module()
    weight = torch.zeros(shape)
    load(weight, SENT)
    weight.view(-1)[-1] += change
    layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    return Placed(layer, "weight", load, weight.shape, torch.Tensor, {})


@pytest.mark.parametrize(
    ("load", "shape", "elements"),
    [(rows(0, 6), (6, 4), 24), (rows(2, 3), (3, 4), 12), (columns, (6, 2), 12), (decay, (6, 4), 24)],
)
def test_a_part_is_as_it_was_sent_or_seen_to_differ(
    load: Callable[[Tensor, Tensor], object], shape: tuple[int, int], elements: int
) -> None:
    seen, held = _read(SENT, [served(load, *shape)])
    assert (seen.tolist(), held) == (SENT.flatten().tolist(), elements)
    seen, held = _read(SENT, [served(load, *shape, change=1.0)])
    assert held == elements
    assert not seen.equal(SENT.flatten())


def test_of_two_places_none_hides_the_other() -> None:
    for changes in ((0.0, 1.0), (1.0, 0.0)):
        seen, held = _read(SENT, [served(rows(0, 6), 6, 4, change=change) for change in changes])
        assert (held, seen[-1].item()) == (24, SENT[-1, -1].item() + 1)
    seen, held = _read(SENT, [served(rows(0, 2), 2, 4), served(rows(2, 4), 4, 4)])
    assert (seen.tolist(), held) == (SENT.flatten().tolist(), 24)


def test_what_others_have_is_not_there() -> None:
    assert _read(SENT, [served(elsewhere, 6, 4)])[1] == 0
    assert _read(SENT, [])[1] == 0
