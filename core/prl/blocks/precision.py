"""Number formats of a whole module. Called by trainer and engine after they have built a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def cast(model: nn.Module, dtype: torch.dtype, *, float32: Sequence[str] = ()) -> None:
    """Bring parameters and buffers to `dtype`, in place; those whose names end in one of `float32` to float32.

    `nn.Module.to` would round a tensor that must stay float32 before anyone could put it back.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if name.endswith(tuple(float32)) else dtype)
