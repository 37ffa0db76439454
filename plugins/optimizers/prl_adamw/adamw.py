"""AdamW from a run's config."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from prl_adamw import AdamWConfig

FUSED_DEVICES = ("cpu", "cuda")


def build(
    config: AdamWConfig, named_parameters: Iterable[tuple[str, nn.Parameter]], learning_rate: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101).

    Matrices decay; vectors (norms, biases) do not. One fused kernel walks all parameters where the device has it, which
    on a CPU is several times faster than one pass per operation. Parameters below float32 have float32 copies.
    """
    trained = [p for _, p in named_parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    narrow = any(p.dtype in (torch.bfloat16, torch.float16) for p in trained)
    return (AdamWWithCopies if narrow else torch.optim.AdamW)(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=all(p.device.type in FUSED_DEVICES for p in trained),
    )


class AdamWWithCopies(torch.optim.AdamW):
    """Moves a float32 copy of every parameter, and rounds the parameter to it: what a step adds is often smaller than
    bfloat16 can show, and would be lost (Micikevicius et al. 2018, arXiv 1710.03740). Means are float32 too."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Gradients are taken from the parameters, in their dtype; there is no closure."""
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self._state(p) for p in parameters]
            adamw(
                [state["copy"] for state in states],
                [p.grad.float() for p in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=group["fused"],
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for parameter, state in zip(parameters, states, strict=True):
                parameter.copy_(state["copy"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch would bring what is kept of a parameter to the parameter's dtype."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, kept in state_dict["state"].items():
            device, state = parameters[index].device, self.state[parameters[index]]
            state |= {key: value.to(device, torch.float32) for key, value in kept.items() if key != "step"}

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            copy = parameter.detach().to(torch.float32, copy=True)
            state["copy"] = copy
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(copy), torch.zeros_like(copy)
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return state
