"""AdamW from a run's config."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from prl_adamw import AdamWConfig

FUSED_DEVICES = ("cpu", "cuda")


def build(
    config: AdamWConfig, named_parameters: Iterable[tuple[str, nn.Parameter]], learning_rate: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101).

    Matrices decay; vectors (norms, biases) do not. One fused kernel walks all parameters where the device has it, which
    on a CPU is several times faster than one pass per operation.
    """
    trained = [p for _, p in named_parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=all(p.device.type in FUSED_DEVICES for p in trained),
    )
