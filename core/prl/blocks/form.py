"""The form a family's tensors take outside of a model: exact, cast, or quantised. On every wire and on disk."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
from torch import Tensor

from prl.providers import Model, NumberFormat


@attrs.frozen(kw_only=True)
class Form:
    """A number format, and what the model excepts from it."""

    number_format: NumberFormat
    float32: tuple[str, ...] = ()
    """Endings of the names of tensors that stay as they are."""
    unquantized: tuple[str, ...] = ()
    """Regular expressions, found in the names of matrices that are only cast."""

    @classmethod
    def of_family(cls, provider: Model, number_format: NumberFormat) -> Form:
        return cls(number_format=number_format, float32=provider.float32, unquantized=provider.unquantized)

    def apply(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        """A Hugging Face tensor -> what is sent or stored."""
        if name.endswith(self.float32):
            return [(name, tensor)]
        if matches(self.unquantized, name) and tensor.is_floating_point():
            return [(name, tensor.to(self.number_format.serve_dtype))]
        return self.number_format.export(name, tensor)

    def declared(self, config: Mapping[str, Any], planned: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
        """`config` for a checkpoint of the tensors `planned`, which were given this form.

        A config with a part for text has the declaration there as well, where Kimi's published ones have it.
        """
        dtype = {"dtype": str(self.number_format.serve_dtype).removeprefix("torch.")}
        declaration = self.number_format.declaration(list(_kept(planned)))
        if declaration is None:
            return {**config, **dtype}
        quantized: dict[str, Any] = {"quantization_config": declaration}
        text = {"text_config": {**config["text_config"], **quantized}} if "text_config" in config else {}
        return {**config, **text, **dtype, **quantized}


def matches(patterns: Sequence[str], name: str) -> bool:
    """Whether one of the regular expressions is found in `name`."""
    return any(re.search(pattern, name) for pattern in patterns)


def _kept(planned: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """Matrices whose form is a plain number."""
    for name, tensor in planned:
        if tensor.dim() == 2 and tensor.dtype.itemsize > 1 and name.endswith(".weight"):
            yield name


def declaration_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config.json says about quantisation, wherever it says it."""
    for place in (config, config.get("text_config") or {}):
        if found := place.get("quantization_config") or place.get("compression_config"):
            return dict(found)
    return None
