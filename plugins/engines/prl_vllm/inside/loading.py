"""Weights under published names into a model that serves: vLLM's own loaders, layer by layer.

vLLM keeps layers in the layout of their kernels and forgets the one they were loaded in. Its layerwise reload restores
each layer's parameters, loads them with the model's own loaders and processes them again, into the same storage, so
that captured graphs stay valid (`vllm.model_executor.model_loader.reload`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn


@attrs.frozen(eq=False)
class Loader:
    """Loads into the model of one vLLM worker."""

    worker: Any

    @property
    def model(self) -> nn.Module:
        model: nn.Module = self.worker.model_runner.get_model()
        return model

    @property
    def config(self) -> Any:
        return self.worker.vllm_config

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the model's weights by all of these."""
        with self.reloading():
            self.model.load_weights(iter(tensors.items()))  # type: ignore[operator]
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """Layers take weights in the layout they are loaded in; those that get none keep what they had."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        with set_current_vllm_config(self.config), torch.no_grad():
            initialize_layerwise_reload(self.model)
            yield
            finalize_layerwise_reload(self.model, self.config.model_config)

    @contextmanager
    def loaders(
        self, change: Callable[[nn.Module, str, Tensor, Callable[..., Any]], Callable[..., Any]]
    ) -> Iterator[None]:
        """Every tensor's loader replaced by `change(layer, name, tensor, loader)`; put back afterwards."""
        from vllm.model_executor.model_loader.weight_utils import default_weight_loader

        replaced: dict[int, tuple[Tensor, Callable[..., Any] | None]] = {}  # modules share tensors
        for layer in self.model.modules():
            for name, tensor in {**layer._parameters, **layer._buffers}.items():
                if tensor is not None and id(tensor) not in replaced:
                    before = getattr(tensor, "weight_loader", None)
                    replaced[id(tensor)] = (tensor, before)
                    tensor.weight_loader = change(layer, name, tensor, before or default_weight_loader)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for tensor, before in replaced.values():
                if before is not None:
                    tensor.weight_loader = before  # type: ignore[attr-defined]
                else:
                    del tensor.weight_loader  # type: ignore[attr-defined]
