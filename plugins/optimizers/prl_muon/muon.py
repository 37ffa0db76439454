"""Muon (Jordan et al. 2024) as scaled by Moonshot (Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv
2502.16982): updates have the root mean square of AdamW's, so that AdamW's learning rate and decay fit.

Matrices of layers move along their momentum with all singular values near one; experts of a stack each on their own.
What several projections share as one matrix (q, k and v; gate and up) is orthogonalised as one. Embeddings, the output
projection and vectors are AdamW's. A matrix that is divided over ranks is made whole for the iteration, one at a time;
stacks of which ranks hold whole experts are not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from prl_muon import MuonConfig

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan's quintic: steep at zero, so that few iterations are enough."""
_RMS = 0.2
"""Of AdamW's updates, typically."""


def build(config: MuonConfig, named_parameters: Iterable[tuple[str, nn.Parameter]], learning_rate: float) -> Muon:
    """Muon for the matrices of layers, AdamW for the other trained parameters."""
    trained = [(name, p) for name, p in named_parameters if p.requires_grad]
    matrices = [p for name, p in trained if _is_matrix_of_layer(name, p)]
    tables = [p for name, p in trained if p.ndim >= 2 and not _is_matrix_of_layer(name, p)]
    vectors = [p for _, p in trained if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "orthogonalised": True},
        {"params": tables, "weight_decay": config.weight_decay, "orthogonalised": False},
        {"params": vectors, "weight_decay": 0.0, "orthogonalised": False},
    ]
    return Muon([group for group in groups if group["params"]], config, learning_rate)


def _is_matrix_of_layer(name: str, parameter: nn.Parameter) -> bool:
    """A convolution's [channels, 1, kernel] is no stack of matrices."""
    return name.startswith("layers.") and parameter.ndim >= 2 and min(parameter.shape[-2:]) > 1


class Muon(torch.optim.AdamW):
    """AdamW whose `orthogonalised` groups move as Muon's."""

    def __init__(self, groups: list[dict[str, Any]], config: MuonConfig, learning_rate: float) -> None:
        super().__init__(groups, lr=learning_rate, betas=config.betas, eps=config.eps)
        self._config = config

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Move every parameter that has a gradient."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["orthogonalised"]]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["orthogonalised"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, parameter.grad, group)

    def _move(self, parameter: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(grad)
        momentum: Tensor = state["momentum"]
        momentum.lerp_(grad, 1 - self._config.momentum)
        ahead = grad.lerp(momentum, self._config.momentum)  # Nesterov's
        scale = _RMS * max(parameter.shape[-2:]) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(orthogonalised(ahead, self._config.iterations), alpha=-group["lr"] * scale)


def orthogonalised(update: Tensor, iterations: int) -> Tensor:
    """update [..., rows, columns], divided over ranks or not -> the same, singular values near one."""
    if not isinstance(update, DTensor):
        return newton_schulz(update, iterations)
    if update.ndim == 3 and all(p.is_replicate() or getattr(p, "dim", None) == 0 for p in update.placements):
        local = newton_schulz(update.to_local(), iterations)
        return DTensor.from_local(
            local, update.device_mesh, update.placements, run_check=False, shape=update.shape, stride=update.stride()
        )
    whole = newton_schulz(update.full_tensor(), iterations)
    everywhere = [Replicate()] * update.device_mesh.ndim
    return DTensor.from_local(whole, update.device_mesh, everywhere, run_check=False).redistribute(
        placements=[Shard(p.dim) if isinstance(p, Shard) else p for p in update.placements]
    )


def newton_schulz(update: Tensor, iterations: int) -> Tensor:
    """update [..., rows, columns] -> U V^T of its singular value decomposition, roughly; in bfloat16 on a GPU."""
    a, b, c = _COEFFICIENTS
    x = update.bfloat16() if update.is_cuda else update.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(update.dtype)
