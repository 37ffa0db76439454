"""Tensors of which a rank holds a part."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """The part of the tensor this rank holds, differentiable; the tensor itself where it is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor of which this rank may hold a part; a collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
