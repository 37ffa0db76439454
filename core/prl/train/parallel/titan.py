"""torchtitan's device meshes, under our names for the axes. The only import of torchtitan.

torchtitan 0.3.0 is made for GPUs: where there is none it takes the device to be CUDA all the same, which is mended
before its meshes are imported. Its trainer, command line, configuration and models are not used.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch.distributed.device_mesh import DeviceMesh

from prl.errors import UserError
from prl.train.layout import REMEDY, Layout

if TYPE_CHECKING:
    from torchtitan.distributed import ParallelDims


class Meshes:
    """The process groups of a layout, as torchtitan's `ParallelDims` builds them."""

    def __init__(self, layout: Layout) -> None:
        self._dims = _parallel_dims(layout)
        self._layout = layout

    @property
    def parameters(self) -> DeviceMesh:
        """[shard * context] or [replicate, shard * context]: what parameters are divided over."""
        return self._with_replicas("fsdp")

    @property
    def experts(self) -> DeviceMesh:
        """The same for the experts of one rank of `expert`."""
        return self._with_replicas("efsdp")

    @property
    def expert(self) -> DeviceMesh:
        return self._mesh("ep")

    @property
    def context(self) -> DeviceMesh:
        return self._mesh("cp")

    def _with_replicas(self, name: str) -> DeviceMesh:
        return self._mesh(["dp_replicate", name] if self._layout.replicate > 1 else name)

    def _mesh(self, names: str | list[str]) -> DeviceMesh:
        mesh: DeviceMesh = self._dims.get_mesh(names)
        return mesh


def _parallel_dims(layout: Layout) -> ParallelDims:
    if find_spec("torchtitan") is None:
        raise UserError(f"more than one trainer rank needs torchtitan, which is not installed: {REMEDY}")
    _prepare()
    from torchtitan.distributed import ParallelDims

    return ParallelDims(
        dp_replicate=layout.replicate,
        dp_shard=layout.shard,
        cp=layout.context,
        tp=1,
        pp=1,
        ep=layout.expert,
        world_size=layout.ranks,
        spmd_backend="partial_dtensor",
    )


def _prepare() -> None:
    logging.getLogger("torchtitan").setLevel(logging.WARNING)
    from torchtitan.tools import utils

    if not torch.cuda.is_available():
        utils.device_type, utils.device_module = "cpu", torch.cpu
