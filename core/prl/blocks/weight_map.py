"""Between a model's tensors and Hugging Face's: small reversible operations that a family lists.

A module fuses what a checkpoint keeps apart (q, k and v; gate and up; one tensor for all experts). Each operation
claims the module tensors whose names end in its suffix, says which checkpoint tensors they are made of, and goes both
ways without changing a bit. A tensor no operation claims is stored as it is, under its prefixed name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeAlias

import attrs
import torch
from torch import Tensor

from prl.providers import WeightMap

Read: TypeAlias = Callable[[str], Tensor]
"""A checkpoint tensor by its name, relative to what comes before an operation's suffix."""


class Operation(Protocol):
    """One way of storing; `suffix` is the end of the module tensor's name, what comes before it is kept."""

    @property
    def suffix(self) -> str: ...

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The module tensor -> (name that replaces the suffix, view)."""

    def join(self, read: Read) -> Tensor:
        """The reverse of `split`."""


@attrs.frozen
class Rows:
    """Several matrices stacked by rows: `parts` are (name, rows), in order."""

    suffix: str
    parts: Sequence[tuple[str, int]]

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        views = torch.split(tensor, [rows for _, rows in self.parts])
        for (name, _), view in zip(self.parts, views, strict=True):
            yield name, view

    def join(self, read: Read) -> Tensor:
        return torch.cat([read(name) for name, _ in self.parts])


@attrs.frozen
class ExpertStack:
    """`count` experts of `parts` (name, rows) each, stored one by one; `{}` in a name is the expert's number.

    The module's tensor is [count, sum of rows, columns].
    """

    suffix: str
    count: int
    parts: Sequence[tuple[str, int]]

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        sizes = [rows for _, rows in self.parts]
        for expert, matrix in enumerate(tensor):
            for (name, _), part in zip(self.parts, torch.split(matrix, sizes), strict=True):
                yield name.format(expert), part

    def join(self, read: Read) -> Tensor:
        return torch.stack([self._expert(expert, read) for expert in range(self.count)])

    def _expert(self, expert: int, read: Read) -> Tensor:
        return torch.cat([read(name.format(expert)) for name, _ in self.parts])


@attrs.frozen
class Tied:
    """One tensor that some checkpoints store a second time under other names, e.g. tied embeddings.

    Copies are not written; where a checkpoint has one it must be equal, else the checkpoint is not of this model.
    """

    suffix: str
    copies: Sequence[str]

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield self.suffix, tensor

    def join(self, read: Read) -> Tensor:
        tensor = read(self.suffix)
        for name in self.copies:
            with suppress(KeyError):
                if not torch.equal(read(name), tensor):
                    raise ValueError(f"{name} differs from {self.suffix}, to which it should be tied")
        return tensor


@attrs.frozen
class StackedView:
    """A checkpoint tensor that is `rows` rows, from `start`, of matrix `index` of a stack."""

    name: str
    index: int
    start: int
    rows: int


def stacked_views(weight_map: WeightMap, name: str, shape: Sequence[int]) -> list[StackedView] | None:
    """What module tensor `name`, a stack [count, rows, columns], is stored as; None when it is no stack of whole rows.

    A rank that holds some matrices of a stack can write and read them without the rest.
    """
    whole = torch.empty(tuple(shape), device="meta")
    views = []
    for hf_name, view in weight_map.to_hf(name, whole) if whole.dim() == 3 else ():
        if view._base is not whole or view.stride() != whole.stride()[1:] or view.shape[1] != whole.shape[2]:
            return None
        index, rest = divmod(int(view.storage_offset()), whole.stride(0))
        views.append(StackedView(hf_name, index, rest // whole.stride(1), len(view)))
    return views or None


@attrs.frozen(kw_only=True)
class ListedWeightMap:
    """A `prl.providers.WeightMap` from a list of operations and name prefixes."""

    operations: Sequence[Operation]
    prefixes: Mapping[str, str]
    """Prefix of a module tensor's name -> prefix in the checkpoint; the longest that fits counts (`""` fits all)."""
    config: Mapping[str, Any]
    """What `hf_config` returns."""
    carried: Sequence[str] = ()
    """Prefixes of checkpoint tensors that the module has no part for."""

    def to_hf(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        """Views of `tensor` under their checkpoint names."""
        operation = self._operation(name)
        if operation is None:
            return [(self._prefixed(name), tensor)]
        stem = name.removesuffix(operation.suffix)
        return [(self._prefixed(stem + part), view) for part, view in operation.split(tensor)]

    def from_hf(self, tensors: Mapping[str, Any], name: str) -> Tensor:
        """KeyError names a checkpoint tensor that is missing, ValueError one that contradicts another."""
        operation = self._operation(name)
        if operation is None:
            tensor: Tensor = tensors[self._prefixed(name)]
            return tensor
        stem = name.removesuffix(operation.suffix)
        return operation.join(lambda part: tensors[self._prefixed(stem + part)])

    def hf_config(self) -> Mapping[str, Any]:
        return self.config

    def _operation(self, name: str) -> Operation | None:
        return next((operation for operation in self.operations if name.endswith(operation.suffix)), None)

    def _prefixed(self, name: str) -> str:
        prefix = max((prefix for prefix in self.prefixes if name.startswith(prefix)), key=len)
        return self.prefixes[prefix] + name.removeprefix(prefix)
