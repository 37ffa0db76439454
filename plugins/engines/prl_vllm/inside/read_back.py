"""What the served weights hold, tensor by tensor, under the names and in the layout of the trainer.

    published name ── model's own loaders, given indices ──► which elements of which parameter it went to
    parameter      ── the layout of its kernel undone    ──► those elements, as they are served

A linear layer whose kernel keeps only a packed copy is read through that kernel, with the identity as its input, which
is exact. Where a loader computes instead of copying (a decay stored as its logarithm), what it makes of the sent tensor
is compared instead. A worker reads what it serves of each tensor, and takes the rest from what was sent: the checksum
is that of the sent tensor if and only if everything that it serves of it is right.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from inspect import signature
from typing import Any

import attrs
import torch
from prl.weights.tensors import tensor_bytes
from torch import Tensor, nn

from prl_vllm.inside.loading import Loader


@attrs.frozen(eq=False)
class Placed:
    """Part of a published tensor that a loader put into a parameter."""

    layer: nn.Module
    parameter: str
    load: Callable[[Tensor, Tensor], Any]
    """(parameter, tensor): the model's loader with its other arguments."""
    shape: torch.Size
    kind: type
    attributes: dict[str, Any]


def checksums(loader: Loader, tensors: Mapping[str, Tensor], names: frozenset[str]) -> Iterator[tuple[str, int, int]]:
    """(name, zlib.crc32 with the served bytes, elements served) of the tensors in `names`, of all when it is empty.

    A tensor of which this worker's model has nothing, since it ignores it or others have it, is not there.
    """
    wanted = {name: tensor for name, tensor in tensors.items() if not names or name in names}
    placed = _placements(loader, wanted)
    for name, tensor in wanted.items():
        served, elements = _read(tensor, placed[name])
        if elements:
            yield name, zlib.crc32(tensor_bytes(served)), elements


def _read(tensor: Tensor, places: list[Placed]) -> tuple[Tensor, int]:
    """The tensor with what is served of it, and how many of its elements are; wrong where any place is."""
    flat = tensor.detach().cpu().flatten().clone()
    seen = torch.zeros(len(flat), dtype=torch.bool)
    elements = 0
    for place in places:
        served = unpacked(place.layer, place.parameter, place.shape)
        index = _scratch(place, torch.int64, served.device)
        place.load(index, 1 + torch.arange(len(flat), device=served.device).reshape(tensor.shape))
        held = index.flatten().nonzero().flatten()  # a small part of a parameter that all experts share
        taken = index.flatten()[held].cpu() - 1
        if _are_elements(taken, len(flat)):
            values = served.flatten()[held].to(tensor.dtype).cpu()
            if not _same_bytes(values, tensor.detach().cpu().flatten()[taken]):  # not to be hidden by another place
                flat[taken] = values
            seen[taken] = True
        else:
            alike, computed = _computed_alike(place, tensor, served)
            elements += computed
            if not alike:
                flat.view(torch.uint8).bitwise_not_()
    return flat, elements + int(seen.sum())


def _are_elements(taken: Tensor, count: int) -> bool:
    """Whether these are places of a tensor of so many elements, each once at most."""
    if not len(taken):
        return True
    return bool(taken.min() >= 0 and taken.max() < count) and len(taken.unique()) == len(taken)


def _same_bytes(left: Tensor, right: Tensor) -> bool:
    return left.contiguous().view(torch.uint8).equal(right.contiguous().view(torch.uint8))


def _computed_alike(place: Placed, tensor: Tensor, served: Tensor) -> tuple[bool, int]:
    """Whether what the loader makes of the tensor is what is served, and of how many elements it makes something."""
    expected = _scratch(place, served.dtype, served.device).fill_(torch.nan)
    place.load(expected, tensor.to(served.device))
    held = ~expected.isnan()
    return expected[held].equal(served[held]), int(held.sum())


def _scratch(place: Placed, dtype: torch.dtype, device: torch.device) -> Tensor:
    made = torch.zeros(place.shape, dtype=dtype, device=device)
    made.__class__ = place.kind
    made.__dict__ = dict(place.attributes)
    return made


# --- where tensors go -------------------------------------------------------------------------------------------------
def _placements(loader: Loader, tensors: Mapping[str, Tensor]) -> dict[str, list[Placed]]:
    """Run the model's loading with loaders that only take note; what is served is put back as it was."""
    placed: dict[str, list[Placed]] = {name: [] for name in tensors}
    current = ""

    def named() -> Iterator[tuple[str, Tensor]]:
        nonlocal current
        for name, tensor in tensors.items():
            current = name
            yield name, tensor

    def note(layer: nn.Module, parameter: str, tensor: Tensor, load: Callable[..., Any]) -> Callable[..., Any]:
        original = _plain(load)
        attributes = {key: value for key, value in tensor.__dict__.items() if key != "weight_loader"}

        @wraps(load)
        def noting(*args: Any, **kwargs: Any) -> bool:
            given = signature(original).bind(*args, **kwargs).arguments
            parameter_word, tensor_word, *_ = given

            def again(into: Tensor, what: Tensor) -> Any:
                return original(**{**given, parameter_word: into, tensor_word: what})

            placed[current].append(Placed(layer, parameter, again, tensor.shape, type(tensor), attributes))
            return True

        return noting

    with loader.reloading(), loader.loaders(note):
        loader.model.load_weights(named())  # type: ignore[operator]
    return placed


def _plain(load: Callable[..., Any]) -> Callable[..., Any]:
    """The model's loader under the layerwise reload's wrappers."""
    while load.__name__ == "online_process_loader":
        load = load.__wrapped__  # type: ignore[attr-defined]
    return load


# --- what a kernel keeps ----------------------------------------------------------------------------------------------
def unpacked(layer: nn.Module, parameter: str, shape: torch.Size) -> Tensor:
    """A parameter as it is served, in the layout `shape` it was loaded in; RuntimeError where that is unknown."""
    kept: Tensor = getattr(layer, parameter).data
    if parameter == "weight" and not kept.numel():
        return _through_kernel(layer, shape)
    isa = _packing(layer)
    if isa and parameter in ("w13_weight", "w2_weight"):
        return _unpack(kept, isa, shape)
    if kept.shape != shape:
        raise RuntimeError(
            f"{type(layer).__name__}.{parameter} is served as {tuple(kept.shape)}, loaded as {tuple(shape)}"
        )
    return kept


def _through_kernel(layer: nn.Module, shape: torch.Size) -> Tensor:
    identity = torch.eye(shape[1], dtype=layer.weight.dtype)
    weight: Tensor = layer.quant_method.apply(layer, identity, None).T  # type: ignore[union-attr, operator]
    return weight


def _packing(layer: nn.Module) -> str:
    """The instruction set that CPU experts are packed for, empty where they are not."""
    kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
    experts = getattr(kernel, "fused_experts", None)
    return getattr(experts, "isa", "") if getattr(experts, "packed", True) else ""


def _unpack(kept: Tensor, isa: str, shape: torch.Size) -> Tensor:
    from vllm._custom_ops import cpu_prepack_moe_weight

    if kept.numel() != shape.numel():
        raise RuntimeError(f"{kept.numel()} packed elements of {shape.numel()} cannot be read back: they are padded")
    # Where an element goes depends on the dtype, and bfloat16 counts to 256: numbers are packed byte by byte.
    numbers = torch.arange(kept.numel()).reshape(shape)
    shifts = range(0, kept.numel().bit_length(), 8)
    digits = [cpu_prepack_moe_weight((numbers >> shift & 255).to(kept.dtype), isa).flatten() for shift in shifts]
    places = torch.stack([digit.long() << shift for digit, shift in zip(digits, shifts, strict=True)]).sum(0)
    flat = torch.empty(kept.numel(), dtype=kept.dtype)
    flat[places] = kept.flatten()
    return flat.reshape(shape)
