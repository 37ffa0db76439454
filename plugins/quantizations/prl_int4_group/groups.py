"""Four-bit integers with a scale per 32 weights of a row, as `prl.providers.NumberFormat`.

    weight [O, I] float  <->  weight_packed [O, I / 8] int32, weight_scale [O, I / 32] bfloat16, weight_shape [2] int64

The layout is `pack-quantized` of compressed-tensors: eight numbers to an int32, the first in the lowest bits, each
stored plus 8. The grid is Kimi's: a group's scale is its largest magnitude over 7, and -8 is not used. In float32 a
number times its scale is exact, and so is the largest over 7: what was restored is exported with the bits it had.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from prl.errors import CheckpointError, UserError
from torch import Tensor

from prl_int4_group import Int4GroupConfig

GROUP = 32
LARGEST = 7
_PER_WORD = 8
_PACKED, _SCALE, _SHAPE = "_packed", "_scale", "_shape"


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [..., O, I] -> whole numbers from -7 to 7 [..., O, I] int32, scales [..., O, I / 32] bfloat16."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / LARGEST).bfloat16()
    scales = torch.where(scales == 0, 1.0, scales)
    numbers = (groups / scales[..., None].float()).round().clamp(-LARGEST, LARGEST)
    return numbers.flatten(-2).int(), scales


def dequantize(numbers: Tensor, scales: Tensor) -> Tensor:
    """The reverse of `quantize`, in float32, where the products are exact."""
    return (numbers.float().unflatten(-1, (-1, GROUP)) * scales[..., None].float()).flatten(-2)


def pack(numbers: Tensor) -> Tensor:
    """Whole numbers from -8 to 7 [O, I] -> [O, I / 8] int32."""
    nibbles = (numbers.int() + 8).unflatten(-1, (-1, _PER_WORD))
    words = nibbles[..., 0]
    for place in range(1, _PER_WORD):
        words = words | (nibbles[..., place] << 4 * place)
    return words


def unpack(words: Tensor) -> Tensor:
    """The reverse of `pack`."""
    places = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    return ((words[..., None] >> places & 15) - 8).flatten(-2)


@attrs.frozen(kw_only=True)
class Int4Group:
    """Matrices of routed experts are quantised; other floating-point tensors travel in bfloat16."""

    train_dtype: torch.dtype = torch.float32
    serve_dtype: torch.dtype = torch.bfloat16
    tolerance: float = 5e-2
    fake_quantization: bool

    def quantizes(self, name: str, shape: Sequence[int]) -> bool:
        """Every published family calls its routed experts `.experts.<number>.`; UserError where groups do not fit."""
        if len(shape) != 2 or ".experts." not in name or not name.endswith(".weight"):
            return False
        if shape[1] % GROUP:
            raise UserError(
                f'quantization.type "int4_group" takes {GROUP} weights of a row together, but {name} has rows of '
                f"{shape[1]}: choose widths of experts that are multiples of {GROUP}"
            )
        return True

    def export(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        if not self.quantizes(name, tensor.shape):
            yield name, tensor.to(self.serve_dtype) if tensor.is_floating_point() else tensor
            return
        numbers, scales = quantize(tensor)
        yield name + _PACKED, pack(numbers)
        yield name + _SCALE, scales
        yield name + _SHAPE, torch.tensor(tensor.shape, device=tensor.device)

    def restore(self, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return _Restored(stored)

    def rounded(self, tensor: Tensor) -> Tensor:
        return dequantize(*quantize(tensor))

    def declaration(self, kept: Sequence[str]) -> Mapping[str, Any] | None:
        """As Kimi's; compressed-tensors, vLLM and transformers read it."""
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": GROUP,
            "dynamic": False,
            "actorder": None,
            "block_structure": None,
            "observer": "minmax",
            "observer_kwargs": {},
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": _patterns(kept),
            "kv_cache_scheme": None,
        }

    def reads(self, declared: Mapping[str, Any] | None) -> bool:
        if declared is None:
            return True
        if (declared.get("quant_method"), declared.get("format")) != ("compressed-tensors", "pack-quantized"):
            return False
        groups = [group.get("weights") or {} for group in (declared.get("config_groups") or {}).values()]
        wanted = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": GROUP}
        return bool(groups) and all({key: group.get(key) for key in wanted} == wanted for group in groups)


def _patterns(kept: Sequence[str]) -> list[str]:
    """Modules that stay as they are: what follows the layer's number says it for all layers and every prefix."""
    tails = {".".join(_tail(name.removesuffix(".weight"))) for name in kept}
    return [rf"re:.*\b{re.escape(tail)}$" for tail in sorted(tails)]


def _tail(module: str) -> Sequence[str]:
    parts = module.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return parts[numbers[-1] + 1 :] if numbers else parts[-1:]


@attrs.frozen
class _Restored(Mapping[str, Tensor]):
    """Float32 where something was packed; everything else as it is stored."""

    _stored: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        if name + _PACKED not in self._stored:
            if name not in self:
                raise KeyError(name)
            return self._stored[name]
        if missing := [name + part for part in (_SCALE, _SHAPE) if name + part not in self._stored]:
            raise CheckpointError(f"{name} is packed, but there is no {missing[0]}: the checkpoint is incomplete")
        packed, scales, shape = (self._stored[name + part] for part in (_PACKED, _SCALE, _SHAPE))
        _check(name, packed, scales, shape)
        return dequantize(unpack(packed), scales)

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        if name + _PACKED in self._stored:
            return True
        return name in self._stored and self._owner(name) is None

    def __iter__(self) -> Iterator[str]:
        for name in self._stored:
            owner = self._owner(name)
            if owner is None:
                yield name
            elif name.endswith(_PACKED):
                yield owner

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _owner(self, name: str) -> str | None:
        """The packed matrix that a stored tensor is a part of."""
        stem, underscore, part = name.rpartition("_")
        return stem if underscore + part in (_PACKED, _SCALE, _SHAPE) and stem + _PACKED in self._stored else None


def _check(name: str, packed: Tensor, scales: Tensor, shape: Tensor) -> None:
    if packed.dtype is not torch.int32 or packed.dim() != 2 or packed.shape[1] % (GROUP // _PER_WORD):
        raise CheckpointError(
            f"{name}{_PACKED} is {packed.dtype} {list(packed.shape)}: expected an int32 matrix of whole groups of "
            f"{GROUP}"
        )
    rows, columns = packed.shape[0], packed.shape[1] * _PER_WORD
    if list(scales.shape) != [rows, columns // GROUP] or not scales.is_floating_point():
        raise CheckpointError(
            f"{name}{_SCALE} is {scales.dtype} {list(scales.shape)}, but a matrix of {[rows, columns]} has "
            f"{[rows, columns // GROUP]} groups of {GROUP}"
        )
    if not shape.is_meta and shape.tolist() != [rows, columns]:
        raise CheckpointError(f"{name}{_SHAPE} says {shape.tolist()}, but {name}{_PACKED} holds {[rows, columns]}")
    if not scales.is_meta and not bool((scales.isfinite() & (scales > 0)).all()):
        raise CheckpointError(f"{name}{_SCALE} has scales that are no positive numbers: the checkpoint is damaged")


def int4_group(config: Int4GroupConfig) -> Int4Group:
    return Int4Group(fake_quantization=config.fake_quantization)
