"""Root-mean-square normalisation, computed in float32 (Zhang and Sennrich 2019, arXiv:1910.07467).

torch has one fused kernel for it on a GPU; on a CPU it differentiates the formula operation by operation, which takes
two to four times as long as the gradient written out here. Tensors without data go that way too: it keeps as much for
the backward pass as the fused kernel does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] / sqrt(mean(x^2 over D) + eps) * weight; weight is [D], or [H, D] for one weight per head."""
    exact = x.is_meta or (x.is_cpu and x.dtype in (torch.float32, torch.float64))
    if exact and not torch.compiler.is_compiling():
        if not torch.is_grad_enabled():
            return (x * _scale(x, eps)).mul_(weight)
        normed: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return normed
    if weight.dim() == 1:
        return functional.rms_norm(x, list(weight.shape), weight, eps)
    return functional.rms_norm(x, [weight.shape[-1]], None, eps) * weight


def _scale(x: Tensor, eps: float) -> Tensor:
    """x [..., D] -> 1 / sqrt(mean(x^2 over D) + eps) [..., 1]."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _scale(x, eps)
        normed = x * scale
        ctx.save_for_backward(normed, weight, scale)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x * scale and g = grad * weight: dx = scale * (g - n * mean(g * n)), dw = sum(grad * n)."""
        normed, weight, scale = ctx.saved_tensors
        product = grad * normed
        for_weight = product.sum(tuple(range(product.dim() - weight.dim())))
        weighted_sum = product.matmul(weight)[..., None] if weight.dim() == 1 else (product * weight).sum(-1, True)
        mean = weighted_sum.div_(weight.shape[-1])
        return (grad * weight).addcmul_(normed, mean, value=-1).mul_(scale), for_weight, None


class RMSNorm(nn.Module):
    """`rms_norm` with a weight [size] that starts at one."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape."""
        return rms_norm(x, self.weight, self.eps)
