"""SignSGD (Bernstein et al. 2018, arXiv 1802.04560): the sign of the gradient, nothing kept from step to step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from prl_sign_sgd import SignSgdConfig


def build(config: SignSgdConfig, named_parameters: Iterable[tuple[str, nn.Parameter]], learning_rate: float) -> SignSgd:
    """Matrices decay; vectors (norms, biases) do not."""
    trained = [p for _, p in named_parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return SignSgd([group for group in groups if group["params"]], {"lr": learning_rate})


class SignSgd(torch.optim.Optimizer):
    """Without state."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Move every parameter that has a gradient by `lr`, against the gradient's sign."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"])
