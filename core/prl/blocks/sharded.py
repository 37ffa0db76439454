"""Tensors of which a rank holds a part.

Engines use modules that ask for their part and never divide anything: DTensor, whose import takes half a second, is
known by its methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import attrs
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_divided(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether ranks hold parts, or copies, of the tensor as one."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The part of the tensor this rank holds, differentiable; the tensor itself where it is not divided."""
    return tensor.to_local() if is_divided(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor of which this rank may hold a part; a collective."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


@attrs.frozen
class Part:
    """What a rank holds of a tensor: `sizes` from `offsets` on, in the whole of `shape`."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    first: bool
    """Of the ranks that hold the same part, this is the first."""

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(start, start + size) for start, size in zip(self.offsets, self.sizes, strict=True))


def part_of(tensor: Tensor, *, rank: int) -> Part:
    """This rank's part; what is not divided all ranks hold."""
    shape = tuple(tensor.shape)
    if not is_divided(tensor):
        return Part(shape, (0,) * len(shape), shape, first=rank == 0)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh = tensor.device_mesh
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    place = mesh.get_coordinate()
    assert place is not None, "every rank is part of every mesh"
    copies = [at for at, placement in zip(place, tensor.placements, strict=True) if placement.is_replicate()]
    return Part(shape, tuple(offsets), tuple(sizes), first=not any(copies))
