"""A process group of two for one transfer, and the bytes that go through it.

The group belongs to nobody else: neither side's other groups notice when the other side dies, and the next transfer
makes its own. Both sides give up at a deadline. Ranks: 0 sends, 1 receives.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeAlias

import attrs
import torch
from prl import network
from torch import Tensor
from torch.distributed import ProcessGroupGloo, Store  # type: ignore[attr-defined]

Backend: TypeAlias = Literal["nccl", "gloo"]
CHUNK = 64 << 20
"""Bytes of one message; two of them are on the device at a time."""
SENDER, RECEIVER = 0, 1
_BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"
_environment = threading.Lock()


@attrs.frozen(kw_only=True, eq=False)
class Pair:
    """One side of a group of two."""

    group: Any
    device: torch.device
    """Where messages are while they travel."""
    deadline: float
    """Of `time.monotonic`."""

    def push(self, content: Tensor) -> None:
        """Send content [bytes] uint8 in host memory; RuntimeError when the other side is gone or too slow."""
        works: list[Any] = []
        for tag, chunk in enumerate(content.split(CHUNK)):
            staged = chunk.to(self.device)  # while the chunk before it travels
            self._wait(works)
            works.append((self.group.send([staged], RECEIVER, tag), staged))
        self._wait(works)

    def pull(self, content: Tensor) -> None:
        """Fill content [bytes] uint8 in host memory with what the other side pushes."""
        coming: list[tuple[Any, Tensor, Tensor]] = []
        for tag, chunk in enumerate(content.split(CHUNK)):
            staged = chunk if self.device.type == "cpu" else torch.empty_like(chunk, device=self.device)
            coming.append((self.group.recv([staged], SENDER, tag), staged, chunk))
            if tag:
                self._land(*coming.pop(0))
        for arrival in coming:
            self._land(*arrival)

    def _land(self, work: Any, staged: Tensor, chunk: Tensor) -> None:
        self._wait([(work, staged)])
        if staged is not chunk:
            chunk.copy_(staged)

    def _wait(self, works: list[Any]) -> None:
        while works:
            work, _ = works.pop()
            work.wait(timedelta(seconds=max(self.deadline - time.monotonic(), 0.001)))


@contextmanager
def joined(backend: Backend, rank: int, store: Store, *, address: str, seconds: float) -> Iterator[Pair]:
    """The group of two that meets in this store; it is gone when the block is left.

    `address`: of this host, where it listens. `seconds`: for everything that is done in the block.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
    make = _nccl if backend == "nccl" else _gloo
    deadline = time.monotonic() + seconds
    group = make(store, rank, address, timedelta(seconds=seconds))
    try:
        if backend == "nccl":
            with torch.cuda.stream(torch.cuda.Stream(device)):  # what this process computes does not wait for copies
                yield Pair(group=group, device=device, deadline=deadline)
        else:
            yield Pair(group=group, device=device, deadline=deadline)
    finally:
        group.abort()


def _gloo(store: Store, rank: int, address: str, timeout: timedelta) -> ProcessGroupGloo:
    options = ProcessGroupGloo._Options()
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timeout
    return ProcessGroupGloo(store, rank, 2, options)


def _nccl(store: Store, rank: int, address: str, timeout: timedelta) -> Any:
    """A group whose failures are exceptions of whoever waits.

    By default torch watches its groups from a thread and ends the process when one fails, for the sake of all others in
    it; it asks the environment as it makes the group, and only there.
    """
    from torch.distributed import ProcessGroupNCCL  # type: ignore[attr-defined] # not in builds for CPUs

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    with _environment:
        for variable, name in network.interfaces(address).items():
            os.environ.setdefault(variable, name)
        before = os.environ.get(_BLOCKING_WAIT)
        os.environ[_BLOCKING_WAIT] = "1"
        try:
            return ProcessGroupNCCL(store, rank, 2, options)
        finally:
            if before is None:
                del os.environ[_BLOCKING_WAIT]
            else:
                os.environ[_BLOCKING_WAIT] = before


def name_of_device() -> str:
    """The GPU that this thread computes on, by a name that no other has; `cpu` where the process has used none."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return "cpu"
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def backend_for(here: str, there: str) -> Backend:
    """NCCL joins two different GPUs, and nothing else."""
    return "nccl" if "cpu" not in (here, there) and here != there else "gloo"
