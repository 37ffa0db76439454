"""A process group of two, and the bytes that go through it.

The group belongs to nobody else: neither side's other groups notice when the other side dies. Every transfer has a
deadline, at which both sides give up, and the group with it. Ranks: 0 sends, 1 receives.
"""

from __future__ import annotations

import itertools
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal, TypeAlias

import attrs
import torch
from prl import network
from prl.weights.host_memory import GRID, cells
from torch import Tensor
from torch.distributed import ProcessGroupGloo, Store  # type: ignore[attr-defined]

Backend: TypeAlias = Literal["nccl", "gloo"]
SLOTS = 3
"""Messages on a sending device at a time: one comes, one goes, one waits."""
SENDER, RECEIVER = 0, 1
_UNWATCHED = {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ENABLE_MONITORING": "0"}
CHANNELS = 4
"""Of NCCL for one worker, divided among its groups: as fast as the bus, from which everything comes.

Four take 70 MB of the device, which a worker of a hundred ranks would not have a hundred times.
"""
_POLL_SECONDS = 5e-5
_LOOKS = 100
"""Polls between two looks at the connection."""
_environment = threading.Lock()


@attrs.frozen(kw_only=True, eq=False)
class Pair:
    """One side of a group of two."""

    group: Any
    device: torch.device
    """Where messages are while they travel."""
    connection: socket.socket
    """With the other side: its end says that the other side is gone, which NCCL does not notice."""
    stream: Any = None
    """Of that device: what this process computes does not wait for messages."""
    tags: Iterator[int] = attrs.field(factory=itertools.count)
    """Both sides number messages alike."""

    @classmethod
    def join(
        cls,
        backend: Backend,
        rank: int,
        store: Store,
        *,
        connection: socket.socket,
        device: torch.device,
        channels: int,
        seconds: float,
    ) -> Pair:
        """The group of two that meets in this store; RuntimeError when the other side does not come.

        `device`: what this side computes on. `channels`: of NCCL.
        """
        address = str(connection.getsockname()[0])
        deadline = time.monotonic() + seconds
        timeout = timedelta(seconds=seconds)
        on = device if backend == "nccl" else torch.device("cpu")
        with torch.cuda.device(on) if on.type == "cuda" else nullcontext():
            if backend == "nccl":
                group = _nccl(store, rank, address, timeout, channels)
            else:
                group = _gloo(store, rank, address, timeout)
            stream = torch.cuda.Stream(on) if on.type == "cuda" else None
            pair = cls(group=group, device=on, connection=connection, stream=stream)
            try:
                pair._greet(rank, deadline)
            except RuntimeError:
                pair.close()
                raise
        return pair

    def _greet(self, rank: int, deadline: float) -> None:
        """NCCL connects with the first message, in this thread, for as long as that takes."""
        with self.on_stream():
            greeting = torch.zeros(1, dtype=torch.uint8, device=self.device)
            if rank == SENDER:
                self.wait(self.group.send([greeting], RECEIVER, next(self.tags)), deadline)
            else:
                self.wait(self.group.recv([greeting], SENDER, next(self.tags)), deadline)

    def on_stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream) if self.stream is not None else nullcontext()

    def push(self, spans: Iterable[Tensor], deadline: float) -> None:
        """Send spans [bytes] uint8 in host memory, none longer than `GRID`; RuntimeError when the other side is gone.

        `deadline` is of `time.monotonic`.
        """
        with self.on_stream():
            slots = [
                torch.empty(GRID, dtype=torch.uint8, device=self.device)
                for _ in range(SLOTS * (self.stream is not None))
            ]
            works: deque[Any] = deque()
            for index, span in enumerate(spans):
                if len(works) == SLOTS:
                    self.wait(works.popleft(), deadline)
                if slots:
                    span = slots[index % SLOTS][: len(span)].copy_(span, non_blocking=True)
                works.append(self.group.send([span], RECEIVER, next(self.tags)))
            for work in works:
                self.wait(work, deadline)

    def post(self, start: int, end: int) -> tuple[Tensor, list[Any]]:
        """Ask for what the other side pushes next, bytes [start, end) of its memory.

        Where they arrive [end - start] uint8, and what is to be waited for.
        """
        with self.on_stream():
            content = torch.empty(end - start, dtype=torch.uint8, device=self.device)
            works = [
                self.group.recv([content[a - start : b - start]], SENDER, next(self.tags)) for a, b in cells(start, end)
            ]
        return content, works

    def wait(self, work: Any, deadline: float) -> None:
        """RuntimeError at the deadline, or when the group has failed."""
        if self.stream is None:
            work.wait(timedelta(seconds=left(deadline)))
            return
        for poll in itertools.count(1):  # torch would look every millisecond or ten
            if work.is_completed():
                work.wait()
                return
            if time.monotonic() > deadline:
                raise RuntimeError("the time for it is over")
            if poll % _LOOKS == 0 and self._lost():
                raise RuntimeError("the other side is gone")
            time.sleep(_POLL_SECONDS)

    def _lost(self) -> bool:
        if not select.select([self.connection], [], [], 0)[0]:
            return False
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def close(self) -> None:
        self.group.abort()


def left(deadline: float) -> float:
    """Seconds until a deadline of `time.monotonic`, for calls that take none for forever."""
    return max(deadline - time.monotonic(), 0.001)


def _gloo(store: Store, rank: int, address: str, timeout: timedelta) -> ProcessGroupGloo:
    options = ProcessGroupGloo._Options()
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timeout
    return ProcessGroupGloo(store, rank, 2, options)


def _nccl(store: Store, rank: int, address: str, timeout: timedelta, channels: int) -> Any:
    """A group whose failures are exceptions of whoever waits.

    By default torch watches its groups from threads and ends the process when one fails or its store is gone, for the
    sake of all others in it; it asks the environment as it makes the group, and only there.
    """
    from torch.distributed import ProcessGroupNCCL  # type: ignore[attr-defined] # not in builds for CPUs

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    options.config.max_ctas = channels
    for variable, name in network.interfaces(address).items():
        os.environ.setdefault(variable, name)
    with _unwatched():
        return ProcessGroupNCCL(store, rank, 2, options)


@contextmanager
def _unwatched() -> Iterator[None]:
    with _environment:
        before = {name: os.environ.get(name) for name in _UNWATCHED}
        os.environ.update(_UNWATCHED)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def device_here() -> torch.device:
    """The GPU that this thread computes on, the CPU where the process has used none."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def name_of(device: torch.device) -> str:
    """A name that no other GPU has; `cpu`."""
    return "cpu" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)


def backend_for(here: str, there: str) -> Backend:
    """NCCL joins two different GPUs, and nothing else."""
    return "nccl" if "cpu" not in (here, there) and here != there else "gloo"
