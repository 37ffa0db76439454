"""How the ranks of a trainer share a model.

The one place that knows about process groups, meshes and FSDP2. Everything else in `prl.train` asks here to shard a
model, to clip a gradient or to see a whole tensor; an adapter for further parallelism (expert, context) answers to the
same questions. On CPU the ranks speak gloo, on CUDA NCCL.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Literal

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor


@attrs.frozen(kw_only=True)
class Ranks:
    """This process among the trainer's ranks."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None
    """None for a single rank, which shards nothing."""

    @classmethod
    def join(cls, device: Literal["auto", "cpu", "cuda"]) -> Ranks:
        """Join the process group that the elastic agent describes in the environment (RANK, WORLD_SIZE, ...)."""
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        chosen = _device(device)
        if world_size == 1:
            return cls(rank=rank, world_size=1, device=chosen, mesh=None)
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        return cls(rank=rank, world_size=world_size, device=chosen, mesh=init_device_mesh(chosen.type, (world_size,)))

    def shard(self, model: nn.Module) -> None:
        """Shard a `prl.providers.LanguageModel` with FSDP2: one unit per layer and one for the rest.

        Gradients become SUMS over ranks, because the denominators of the losses are global.
        """
        if self.mesh is None:
            return
        for layer in model.get_submodule("layers").children():
            fully_shard(layer, mesh=self.mesh)
        fully_shard(model, mesh=self.mesh)
        register_fsdp_forward_method(model, "hidden")
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                # Gloo has no pre-multiplied sum, which a divide factor would otherwise be turned into.
                module.set_force_sum_reduction_for_comms(True)

    def leave(self) -> None:
        """Leave the process group."""
        if self.mesh is not None:
            dist.destroy_process_group()


def full(tensor: Tensor) -> Tensor:
    """The whole tensor of which this rank may hold a shard; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of the tensor this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale gradients to at most `max_norm` over all parameters and ranks; returns the norm before."""
    held = [p for p in parameters if p.grad is not None]
    norm = full(nn.utils.get_total_norm([p.grad for p in held if p.grad is not None]))
    nn.utils.clip_grads_with_norm_(held, max_norm, norm)
    return float(norm)


def _device(choice: Literal["auto", "cpu", "cuda"]) -> torch.device:
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
