"""fp32 and bf16 as `prl.providers.NumberFormat`: nothing but a cast on the way out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from prl_native import Bf16Config, Fp32Config


@attrs.frozen(kw_only=True)
class NativeFormat:
    """Floating-point tensors travel in the dtype they are served in; integers as they are."""

    train_dtype: torch.dtype
    serve_dtype: torch.dtype
    tolerance: float
    fake_quantization: bool = False

    def quantizes(self, name: str, shape: Sequence[int]) -> bool:
        return False

    def export(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        yield name, tensor.to(self.serve_dtype) if tensor.is_floating_point() else tensor

    def restore(self, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return stored

    def rounded(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.serve_dtype).float()

    def declaration(self, kept: Sequence[str]) -> Mapping[str, Any] | None:
        return None

    def reads(self, declared: Mapping[str, Any] | None) -> bool:
        return declared is None


def fp32(config: Fp32Config) -> NativeFormat:
    return NativeFormat(train_dtype=torch.float32, serve_dtype=torch.float32, tolerance=1e-5)


def bf16(config: Bf16Config) -> NativeFormat:
    """Optimizer state is float32 in any case; parameters and arithmetic of the trainer are what the section says."""
    held = torch.bfloat16 if config.parameters == "bfloat16" else torch.float32
    return NativeFormat(train_dtype=held, serve_dtype=torch.bfloat16, tolerance=1e-2)
