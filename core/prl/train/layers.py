"""What a run asks of a model's layers: what to compute again in the backward pass, from where, and what to compile."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from prl.blocks.decoder import ALL, Layer
from prl.blocks.host_memory import HostMemory
from prl.blocks.moe import MixtureOfExperts
from prl.compose.config import TrainerSection
from prl.errors import UserError


def apply(model: nn.Module, trainer: TrainerSection) -> None:
    """Set every layer of a `prl.providers.LanguageModel` up; before the model is divided over ranks."""
    again = {"none": (), "full": (ALL,), "selective": trainer.recompute}[trainer.activation_checkpointing]
    if trainer.compile:
        # Layers of several kinds share their code, and torch gives up on code it has compiled too often.
        count = len(list(model.get_submodule("layers").children()))
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * count)
    host = HostMemory() if trainer.activation_offload else None
    if again or trainer.compile:
        for layer in _layers(model):
            layer.recompute, layer.host = frozenset(again), host
            if trainer.compile and _can_be_compiled(layer):
                layer.compile_mix()


def _layers(model: nn.Module) -> Iterable[Layer]:
    layers = model.get_submodule("layers").children()
    for layer in layers:
        if not isinstance(layer, Layer):
            raise UserError(
                f"trainer.activation_checkpointing and trainer.compile need layers that are prl.blocks.decoder.Layer; "
                f"{type(model).__name__} has {type(layer).__name__}"
            )
        yield layer


def _can_be_compiled(layer: Layer) -> bool:
    """torch compiles grouped products of bfloat16 alone; a layer with experts in another format stays as it is."""
    experts = [module.experts for module in layer.modules() if isinstance(module, MixtureOfExperts)]
    return all(parameter.dtype is torch.bfloat16 for module in experts for parameter in module.parameters())
