"""What waits in host memory comes back, and is not on the device meanwhile."""

from __future__ import annotations

import weakref

import pytest
import torch
from prl.blocks.host_memory import HostMemory
from torch import Tensor
from torch.utils.checkpoint import checkpoint

DEPTH = 4
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


class Chain:
    """Matrices one after the other, each recomputed in the backward pass."""

    def __init__(self, device: str, memory: HostMemory | None) -> None:
        torch.manual_seed(0)
        self.matrices = [torch.randn(8, 8, device=device, requires_grad=True) for _ in range(DEPTH)]
        self.start = torch.randn(5, 8, device=device)
        self.memory = memory
        self.inputs: list[weakref.ref[Tensor]] = []

    def forward(self, scale: float) -> Tensor:
        x = self.start * scale + 0 * self.matrices[0].sum()
        for index in range(DEPTH):
            self.inputs.append(weakref.ref(x))
            x = self._layer(x, index)
        return x

    def _layer(self, x: Tensor, index: int) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return x + torch.tanh(x @ self.matrices[index])

        if self.memory is None:
            return run(x)
        with self.memory.keeping():
            return checkpoint(run, x, use_reentrant=False)

    def gradients(self) -> list[Tensor]:
        return [matrix.grad.clone() for matrix in self.matrices]


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_the_same_bits_over_several_passes(device):
    plain, away = Chain(device, None), Chain(device, HostMemory())
    for chain in (plain, away):
        for scale in (1.0, 0.5):  # gradients of micro-batches add up
            chain.forward(scale).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(plain.gradients(), away.gradients(), strict=True))


def test_between_the_passes_only_the_last_input_is_still_here():
    chain = Chain("cpu", HostMemory())
    out = chain.forward(1.0)
    assert [reference() is not None for reference in chain.inputs] == [False] * (DEPTH - 1) + [True]
    out.sum().backward()
    assert all(reference() is None for reference in chain.inputs)


def test_a_pass_that_was_given_up_is_forgotten():
    """Its graph is gone; the next pass does not bring it back."""
    plain, away = Chain("cpu", None), Chain("cpu", HostMemory())
    away.forward(3.0)
    for chain in (plain, away):
        chain.forward(1.0).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(plain.gradients(), away.gradients(), strict=True))
    assert all(reference() is None for reference in away.inputs)
