"""The optimizer's state in host memory while the model computes, on the device only while parameters move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from prl.blocks.sharded import is_divided


@contextmanager
def at_hand(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, state lies where its parameters do; afterwards, what the optimizer made included, in host memory."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                state[key] = moved(value, parameter.device)
    yield
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim():  # counts of steps stay where the optimizer wants them
                state[key] = moved(value, torch.device("cpu"))


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; of a divided one this rank's part."""
    if not is_divided(tensor):
        return tensor.to(device)
    return DTensor.from_local(
        tensor.to_local().to(device),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
