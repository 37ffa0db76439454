"""Seams: the operations of the blocks that a run can have computed by something else than plain torch.

    attend          prl.blocks.attend    softmax attention over packed tokens and caches
    sparse_attend   prl.blocks.dsa       the same over selected tokens
    index_scores    prl.blocks.dsa       what an indexer thinks of every earlier token
    select_topk     prl.blocks.dsa       the tokens it selects
    grouped_mm      prl.blocks.moe       every expert's product with its own tokens
    dispatch        prl.blocks.moe       tokens to the experts they are sent to, and back
    ssd_scan        prl.blocks.mamba2    the recurrence over a sequence
    causal_conv     prl.blocks.mamba2    the short convolution before it

Each is a function that is its own reference: what a kernel computes is what the function would, to float precision. A
config's `[kernels.<seam>]` names the kernel of a plugin; the choice is the process's, made once before anything is
computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, cast

import attrs

from prl.errors import UserError

if TYPE_CHECKING:
    import torch

    from prl.compose.compose import Composition
    from prl.providers import Kernel

P = ParamSpec("P")
R = TypeVar("R")

SEAMS: dict[str, Seam[Any, Any]] = {}
"""By name; filled by the modules that define them."""
_HOMES = ("attend", "dsa", "moe", "mamba2")


class Seam(Generic[P, R]):
    """A function that another one can stand in for."""

    def __init__(self, reference: Callable[P, R]) -> None:
        functools.update_wrapper(self, reference)
        self.reference = reference
        self.chosen = reference

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.chosen(*args, **kwargs)


def seam(reference: Callable[P, R]) -> Seam[P, R]:
    """Declares a function to be a seam and the reference of its kernels."""
    made = SEAMS[reference.__name__] = Seam(reference)
    return made


def install(composition: Composition, device: torch.device) -> None:
    """Let this process compute on `device` with the kernels of the run; UserError says why one is unavailable."""
    for home in _HOMES:
        import_module(f"prl.blocks.{home}")
    for name, section in attrs.asdict(composition.run.kernels, recurse=False).items():
        SEAMS[name].chosen = SEAMS[name].reference if section is None else _kernel(composition, name, section, device)


def release() -> None:
    """Let kernels that hold something of process groups give it back (`close()`): all ranks, before the groups end."""
    for declared in SEAMS.values():
        if close := getattr(declared.chosen, "close", None):
            close()


def _kernel(composition: Composition, name: str, section: Any, device: torch.device) -> Callable[..., Any]:
    provider = cast("Kernel", composition.provider(section))
    if provider.device and device.type != provider.device:
        raise UserError(
            f"kernels.{name}: kernel {provider.name!r} is unavailable: it needs {provider.device}, and this process "
            f"computes on {device.type}; leave the section out, or choose another"
        )
    kernel: Callable[..., Any] = composition.build(section)
    return kernel
