"""Feed-forward layers: gated, down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202), and squared ReLU,
down(relu(up(x))^2) (So et al. 2021, arXiv:2109.08668).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from prl.blocks.context import Context
from prl.blocks.linear import Linear


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [N, 2 F] = [gate | up] -> silu(gate) * up [N, F]."""
    if torch.is_grad_enabled() and gate_up.device.type == "cpu" and not torch.compiler.is_compiling():
        gated: Tensor = _SwiGlu.apply(gate_up)  # type: ignore[no-untyped-call]
        return gated
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate) * up


class _SwiGlu(Function):
    """Writes both halves of the gradient into one tensor, which torch would assemble from two padded with zeros."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        gradient = torch.empty_like(gate_up)
        for_gate, for_up = gradient.chunk(2, -1)
        torch.mul(functional.silu(gate), grad, out=for_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=for_gate)
        return gradient


class GatedMLP(nn.Module):
    """A mixer. `gate_up_proj` holds the rows of gate, then those of up."""

    kind: ClassVar[str] = "mlp"
    shares_prefixes = True

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor, context: Context, layer_index: int) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        projected: Tensor = self.down_proj(swiglu(self.gate_up_proj(x)))
        return projected


class SquaredReluMLP(nn.Module):
    """A mixer without a gate."""

    kind: ClassVar[str] = "mlp"
    shares_prefixes = True

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor, context: Context, layer_index: int) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        projected: Tensor = self.down_proj(self.up_proj(x).relu().square())
        return projected
