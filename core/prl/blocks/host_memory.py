"""What the backward pass will ask for, in host memory until then: copied away and back while layers compute.

    forward     a tensor is copied to pinned memory; it stays on the device until the next one follows, by when its copy
                is done, so that nothing waits
    backward    when one is asked for, the copy of the one before it begins

Copies have a stream of their own. Only on a GPU does that save anything; on a CPU tensors are copied all the same, by
the same rules and without streams.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class HostMemory:
    """One model's, on one device. `keeping()` wraps what saves tensors; autograd asks for them in reverse."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._last: Kept | None = None
        """The one whose tensor is still on the device."""

    def keeping(self) -> AbstractContextManager[Any]:
        """Inside, what autograd saves goes to host memory."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Kept:
        before, self._last = self._last, None
        if before is not None:
            self._settle(before)
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        kept = Kept(host=host, here=tensor, before=None if before is None else weakref.ref(before))
        self._copy(host, tensor, kept)
        self._last = kept
        return kept

    def _unpack(self, kept: Kept) -> Tensor:
        self._last = None
        tensor = kept.here if kept.here is not None else self._fetched(kept)
        if kept.copied is not None:
            torch.cuda.current_stream().wait_event(kept.copied)
        before = None if kept.before is None else kept.before()
        if before is not None:
            self._fetched(before)
        kept.here = None
        return tensor

    def _fetched(self, kept: Kept) -> Tensor:
        """On the device, as soon as its copy is done."""
        if kept.here is None:
            kept.here = torch.empty_like(kept.host, device=kept.device)
            self._copy(kept.here, kept.host, kept)
        return kept.here

    def _settle(self, kept: Kept) -> None:
        """Its memory on the device may be used again by what is computed from now on."""
        if kept.copied is not None:
            torch.cuda.current_stream().wait_event(kept.copied)
        kept.here = None

    def _copy(self, to: Tensor, source: Tensor, kept: Kept) -> None:
        if not (to.is_cuda or source.is_cuda):
            to.copy_(source)
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # What is copied must have been computed, and what is overwritten read.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
            kept.copied = self._stream.record_event()


@attrs.define(kw_only=True, eq=False)
class Kept:
    """A tensor that is away."""

    host: Tensor
    here: Tensor | None
    """On the device: not yet gone, or already back."""
    before: weakref.ref[Kept] | None
    """The one that was kept before it, and will be asked for after it; it goes with its graph."""
    device: torch.device = attrs.field(init=False)
    copied: torch.cuda.Event | None = None
    """Its latest copy is done; None without streams."""

    def __attrs_post_init__(self) -> None:
        assert self.here is not None
        self.device = self.here.device
