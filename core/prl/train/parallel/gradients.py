"""One norm over gradients that are divided in different ways."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from prl.blocks.sharded import full


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale gradients to at most `max_norm` over all parameters and ranks; returns the norm before."""
    held: dict[object, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            grad = parameter.grad
            held[(grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None].append(parameter)
    norms = [full(nn.utils.get_total_norm(_gradients(group))) for group in held.values()]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    for group in held.values():
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return float(norm)


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
