"""Matrix products of packed tokens: a `Linear` without bias whose CPU kernel is the fastest at hand.

Called by every block and by whoever computes logits from `LanguageModel.head()`. In float32 torch sends products to
MKL, which keeps to AVX2 on processors that are not Intel's; there oneDNN, in the same torch, uses AVX-512. Measured
with one thread: on a Zen 5, 5120 x 128 x 512 at 90 and 220 GFLOP/s; on a Xeon with AMX the products of a training
step were 12% slower with oneDNN. Small products stay with MKL, whose calls cost less.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from prl.blocks import invariance
from prl.blocks.rounding import Rounds


def _onednn_available() -> bool:
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _intel() -> bool:
    """True also where nothing says who made the processor."""
    try:
        return "AuthenticAMD" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True


_ONEDNN = _onednn_available() and not _intel()
_ONEDNN_MIN_PRODUCTS = 2**20
"""Multiply-adds from which oneDNN's kernel outweighs its dearer call; measured."""


def _invariant(x: Tensor, weight: Tensor) -> Tensor:
    """[T, O] in products of one size, with the kernel that suits it."""
    plain = _ONEDNN and x.dtype is torch.float32 and type(weight) in _PLAIN
    if plain and invariance.TILE_ROWS * weight.numel() >= _ONEDNN_MIN_PRODUCTS:
        return invariance.in_tiles(x, lambda tile: _onednn(tile, weight))
    return invariance.in_tiles(x, lambda tile: functional.linear(tile, weight))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, I], weight [O, I] -> [T, O] = x @ weight.T, differentiable in both."""
    if invariance.wanted() and x.device.type == "cpu":
        return _invariant(x, weight)
    if not (_ONEDNN and x.dtype is torch.float32 and x.device.type == "cpu" and type(weight) in _PLAIN):
        return functional.linear(x, weight)
    if torch.compiler.is_compiling() or len(x) * weight.numel() < _ONEDNN_MIN_PRODUCTS:
        return functional.linear(x, weight)
    if torch.is_grad_enabled():
        product: Tensor = _OneDnnLinear.apply(x, weight)  # type: ignore[no-untyped-call]
        return product
    return _onednn(x, weight)


_PLAIN = (Tensor, nn.Parameter)
"""Subclasses (sharded, fake, quantized tensors) go through torch's dispatch."""


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, I] (made contiguous), weight [O, I] (any strides) -> [T, O]."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
    return product


class _OneDnnLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x = _onednn(grad, weight.t()) if ctx.needs_input_grad[0] else None
        return for_x, _weight_gradient(grad, x) if ctx.needs_input_grad[1] else None


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad [T, O], x [T, I] -> grad.T @ x [O, I]. oneDNN copies a transposed first argument, so that is the smaller."""
    if grad.shape[1] <= x.shape[1]:
        return _onednn(grad.t(), x.t())
    return _onednn(x.t(), grad.t()).t().contiguous()


class Linear(Rounds, nn.Linear):
    """`nn.Linear` without bias, through `linear`; weight [out_features, in_features] is left for the model to draw."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: `prl.blocks.decoder.initialise` draws all weights of a model at once, in one order."""

    def forward(self, x: Tensor) -> Tensor:
        """x [T, in_features] -> [T, out_features]."""
        return linear(x, self.as_served("weight"))
