"""Which of a version's tensors a worker loads: under expert parallelism only those of the experts that it has.

vLLM's loaders throw away what is for experts of others; by vLLM's own rule for checkpoints, whole matrices can be left
out beforehand, and what is small beside them cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def wanted(model: nn.Module, config: Any) -> Callable[[str], bool]:
    """Whether the worker with this model (vLLM's, and its configuration) needs the published tensor of a name."""
    experts = _experts_here(model, config)
    if experts is None:
        return lambda name: True
    from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

    return lambda name: not should_skip_weight(name, experts)


def _experts_here(model: nn.Module, config: Any) -> set[int] | None:
    """Numbers of the experts that this worker has in any layer; None for all.

    Where vLLM places copies of experts anew as their use changes (EPLB), any may be next.
    """
    managers = [layer.expert_map_manager for layer in model.modules() if hasattr(layer, "expert_map_manager")]
    maps = [manager.expert_map for manager in managers]  # [experts] place here, -1 elsewhere
    if not maps or config.parallel_config.enable_eplb or any(places is None for places in maps):
        return None
    return {expert for places in maps for expert in (places >= 0).nonzero().flatten().tolist()}
