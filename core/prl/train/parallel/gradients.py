"""One norm over gradients that are divided in different ways, and the sums that FSDP does not make."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prl.blocks.sharded import full, is_divided


def sum_undivided(parameters: Iterable[nn.Parameter]) -> None:
    """Add up over all ranks the gradients of parameters that every rank holds whole, where others are divided.

    FSDP divides parameters of one dtype; the few of another (decays of Mamba-2 in float32) it leaves alone.
    """
    grads = _gradients(parameters)
    whole = [grad for grad in grads if not is_divided(grad)]
    if not whole or len(whole) == len(grads):
        return
    summed = torch.cat([grad.float().flatten() for grad in whole])
    dist.all_reduce(summed)
    for grad, part in zip(whole, torch.split(summed, [grad.numel() for grad in whole]), strict=True):
        grad.copy_(part.view_as(grad))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale gradients to at most `max_norm` over all parameters and ranks; returns the norm before."""
    held: dict[object, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            grad = parameter.grad
            held[(grad.device_mesh, grad.placements) if is_divided(grad) else None].append(parameter)
    norms = [full(nn.utils.get_total_norm(_gradients(group))) for group in held.values()]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    for group in held.values():
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return float(norm)


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
