"""float8_e4m3 with a scale per block of 128 x 128, as `prl.providers.NumberFormat`.

    weight [O, I] float  <->  weight [O, I] float8_e4m3fn, weight_scale_inv [ceil(O / 128), ceil(I / 128)] float32

A block's scale is its largest magnitude, as bfloat16, over 448. For bfloat16 weights, which published scales come from,
that is the usual max / 448; and because a restored block's largest magnitude rounds back to the same bfloat16 number,
what was restored is exported with the bits it had, from float32 and from bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from prl.errors import CheckpointError
from torch import Tensor
from torch.nn import functional

from prl_fp8_block import Fp8BlockConfig

BLOCK = 128
LARGEST = 448.0
"""Of float8_e4m3fn."""
_SCALE = "_scale_inv"


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [..., O, I] -> float8_e4m3fn [..., O, I], scales [..., ceil(O / 128), ceil(I / 128)] float32."""
    blocks = _blocks(weight.float())  # [..., o, 128, i, 128]
    scales = blocks.abs().amax((-3, -1)).bfloat16().float() / LARGEST
    scales = torch.where(scales == 0, 1.0, scales)
    codes = (blocks / scales[..., :, None, :, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return _unblocked(codes, weight.shape), scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """The reverse of `quantize`, in float32."""
    return _unblocked(_blocks(codes.float()) * scales[..., :, None, :, None], codes.shape)


def _blocks(matrices: Tensor) -> Tensor:
    """[..., O, I] -> [..., o, 128, i, 128], filled up with zeros."""
    rows, columns = matrices.shape[-2:]
    padded = functional.pad(matrices, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))


def _unblocked(blocks: Tensor, shape: Sequence[int]) -> Tensor:
    return blocks.flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]].contiguous()


@attrs.frozen(kw_only=True)
class Fp8Block:
    """Matrices called `.weight` are quantised; other floating-point tensors travel in bfloat16."""

    train_dtype: torch.dtype = torch.float32
    serve_dtype: torch.dtype = torch.bfloat16
    tolerance: float = 5e-2
    fake_quantization: bool

    def quantizes(self, name: str, shape: Sequence[int]) -> bool:
        return len(shape) == 2 and name.endswith(".weight")

    def export(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        if not self.quantizes(name, tensor.shape):
            yield name, tensor.to(self.serve_dtype) if tensor.is_floating_point() else tensor
            return
        codes, scales = quantize(tensor)
        yield name, codes
        yield name + _SCALE, scales

    def restore(self, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return _Restored(stored)

    def rounded(self, tensor: Tensor) -> Tensor:
        return dequantize(*quantize(tensor))

    def declaration(self, kept: Sequence[str]) -> Mapping[str, Any] | None:
        """As DeepSeek's and GLM's; vLLM and transformers read it."""
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": [name.removesuffix(".weight") for name in kept],
        }

    def reads(self, declared: Mapping[str, Any] | None) -> bool:
        if declared is None:
            return True
        block = declared.get("weight_block_size")
        return declared.get("quant_method") == "fp8" and block == [BLOCK, BLOCK]


@attrs.frozen
class _Restored(Mapping[str, Tensor]):
    """Float32 where there was a scale; everything else as it is stored."""

    _stored: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        if name.endswith(_SCALE):
            raise KeyError(name)
        weight = self._stored[name]
        if name + _SCALE not in self._stored:
            if weight.dtype is torch.float8_e4m3fn:
                raise CheckpointError(f"{name} is float8, but there is no {name}{_SCALE}: the checkpoint is incomplete")
            return weight
        scales = self._stored[name + _SCALE]
        _check(name, weight, scales)
        return dequantize(weight, scales.float())

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._stored if not name.endswith(_SCALE))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _check(name: str, weight: Tensor, scales: Tensor) -> None:
    if weight.dtype is not torch.float8_e4m3fn or weight.dim() != 2:
        raise CheckpointError(
            f"{name} has a scale per block, but is {weight.dtype} {list(weight.shape)}: expected a float8_e4m3fn matrix"
        )
    expected = [-(-size // BLOCK) for size in weight.shape]
    if list(scales.shape) != expected or not scales.is_floating_point():
        raise CheckpointError(
            f"{name}{_SCALE} is {scales.dtype} {list(scales.shape)}, but a matrix of {list(weight.shape)} has "
            f"{expected} blocks of {BLOCK} x {BLOCK}"
        )
    if not scales.is_meta and not bool((scales.isfinite() & (scales > 0)).all()):
        raise CheckpointError(f"{name}{_SCALE} has scales that are no positive numbers: the checkpoint is damaged")


def fp8_block(config: Fp8BlockConfig) -> Fp8Block:
    return Fp8Block(fake_quantization=config.fake_quantization)
