"""This process among the trainer's ranks: who it works with, and which part of a model it holds.

Everything else in `prl.train` asks here to divide a model. On CPU the ranks speak gloo, on CUDA NCCL.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Literal

import attrs
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from prl.blocks.moe import MixtureOfExperts
from prl.errors import UserError
from prl.train.layout import Layout
from prl.train.parallel.context import ContextGroup
from prl.train.parallel.experts import AllToAll
from prl.train.parallel.titan import Meshes


@attrs.frozen(kw_only=True, eq=False)
class Ranks:
    """One rank of a layout."""

    rank: int
    device: torch.device
    layout: Layout = attrs.field(factory=Layout)
    meshes: Meshes | None = None
    """None for a single rank, which divides nothing."""
    context: ContextGroup | None = None
    """Who shares this rank's sequences."""

    @classmethod
    def join(cls, device: Literal["auto", "cpu", "cuda"], layout: Layout) -> Ranks:
        """Join the process group that the elastic agent describes in the environment (RANK, WORLD_SIZE, ...)."""
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if world_size != layout.ranks:
            raise UserError(f"{world_size} trainer processes were started, and their layout is of {layout.ranks}")
        chosen = _device(device)
        if world_size > 1:
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        return cls.laid_out(rank, chosen, layout)

    @classmethod
    def laid_out(cls, rank: int, device: torch.device, layout: Layout) -> Ranks:
        """Lay out a process group that was joined; may be done again with another layout of as many ranks."""
        if layout.ranks == 1:
            return cls(rank=rank, device=device)
        meshes = Meshes(layout)
        context: ContextGroup | None = None
        if layout.context > 1:
            _, index = layout.place(rank)
            context = ContextGroup(
                index=index,
                count=layout.context,
                group=meshes.context.get_group(),
                divides_heads=layout.divides_heads,
            )
        return cls(rank=rank, device=device, layout=layout, meshes=meshes, context=context)

    @property
    def world_size(self) -> int:
        return self.layout.ranks

    @property
    def reports(self) -> bool:
        """Of ranks that compute the same sums over the same sequences one reports them."""
        return self.context is None or self.context.index == 0

    def shard(self, model: nn.Module) -> None:
        """Divide a `prl.providers.LanguageModel`: experts over `expert`, then everything with FSDP2, one unit per
        layer, one per layer's experts and one for the rest.

        Gradients become SUMS over ranks, because the denominators of the losses are global. Parameters of another dtype
        than most stay whole: `prl.train.parallel.gradients.sum_undivided`.
        """
        if self.meshes is None:
            return
        if self.layout.expert > 1:
            self._divide_experts(model, self.meshes)
        apart = _of_another_dtype(model)
        for layer in model.get_submodule("layers").children():
            fully_shard(layer, mesh=self.meshes.parameters, ignored_params=apart)
        fully_shard(model, mesh=self.meshes.parameters, ignored_params=apart)
        register_fsdp_forward_method(model, "hidden")
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                # Gloo has no pre-multiplied sum, which a divide factor would otherwise be turned into.
                module.set_force_sum_reduction_for_comms(True)

    def _divide_experts(self, model: nn.Module, meshes: Meshes) -> None:
        mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
        if not mixtures:
            raise UserError(f"trainer.expert is {self.layout.expert}, and the model has no experts")
        count, mesh = self.layout.expert, meshes.expert
        exchange = AllToAll(group=mesh.get_group(), count=count)
        for mixture in mixtures:
            for name, parameter in list(mixture.experts.named_parameters(recurse=False)):
                if len(parameter) % count:
                    raise UserError(f"trainer.expert must divide the {len(parameter)} experts of a layer, got {count}")
                own = parameter.detach().chunk(count)[mesh.get_local_rank()].clone()
                divided = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
                mixture.experts.register_parameter(name, nn.Parameter(divided, requires_grad=parameter.requires_grad))
            mixture.run_experts = exchange
            fully_shard(mixture.experts, mesh=meshes.experts, shard_placement_fn=_whole_experts(meshes, count))

    def leave(self) -> None:
        """Leave the process group."""
        if self.meshes is not None:
            dist.destroy_process_group()


def _of_another_dtype(model: nn.Module) -> set[nn.Parameter]:
    """FSDP takes parameters of one dtype. The others, small vectors that must stay exact, every rank keeps."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        sizes[parameter.dtype] += parameter.numel()
    ((most, _),) = sizes.most_common(1)
    return {parameter for parameter in model.parameters() if parameter.dtype is not most}


def _whole_experts(meshes: Meshes, expert: int) -> Callable[[nn.Parameter], Shard]:
    """Ranks hold whole experts where there are enough of them, else rows of all."""
    ranks = meshes.experts.size(-1)

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(0 if len(parameter) % (expert * ranks) == 0 else 1)

    return placement


def _device(choice: Literal["auto", "cpu", "cuda"]) -> torch.device:
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
