"""Room for a version's tensors in host memory, pinned where a GPU copies them: at the speed of the bus, then.

Pinning takes longer than copying, so memory that is given up is used again: torch keeps pinned blocks, in sizes that
are powers of two. Hence segments of such sizes; only a tensor larger than a segment may waste some.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import attrs
import torch
from torch import Tensor

from prl.types import TensorRecord
from prl.weights import crc
from prl.weights.tensors import LARGE, LOT, THREADS, record_of, round_up, tensor_bytes

GRID = 16 << 20
"""Segments begin at multiples of so many bytes, so that a span between two multiples lies in one."""
SEGMENT = 256 << 20


@attrs.define(eq=False)
class HostMemory:
    """Grows as room is taken; places count from 0 as if all of it were one piece."""

    pinned: bool = False
    _starts: list[int] = attrs.field(factory=list)
    _segments: list[Tensor] = attrs.field(factory=list)
    end: int = 0
    """Byte after the last one taken."""

    def take(self, nbytes: int) -> tuple[int, Tensor]:
        """Where it begins, and room [nbytes] uint8."""
        start = round_up(self.end)
        if not self._segments or start + nbytes > self._starts[-1] + len(self._segments[-1]):
            start = round_up(self.end, GRID)
            size = max(nbytes, min(SEGMENT, 2 * len(self._segments[-1])) if self._segments else 1 << 20)
            self._segments.append(torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned))
            self._starts.append(start)
        self.end = start + nbytes
        return start, self.span(start, self.end)

    def keep(self, tensor: Tensor, *, non_blocking: bool = False) -> Tensor:
        """A copy of the tensor here; done when this returns, or else when the current stream is."""
        _, room = self.take(tensor.nbytes)
        copy = room.view(tensor.dtype).view(tensor.shape)
        copy.copy_(tensor, non_blocking=non_blocking)
        return copy

    def span(self, start: int, end: int) -> Tensor:
        """[end - start] uint8, of one segment; IndexError where there is no such."""
        index = bisect_right(self._starts, start) - 1
        if not 0 <= start <= end <= self.end or index < 0:
            raise IndexError(f"bytes {start} to {end} of {self.end}")
        first, segment = self._starts[index], self._segments[index]
        if end - first > len(segment):
            raise IndexError(f"bytes {start} to {end} are not of one segment")
        return segment[start - first : end - first]


class Landing:
    """Copies of a GPU's tensors, made beside whatever it computes and whoever brings the next ones."""

    def __init__(self, memory: HostMemory, device: torch.device) -> None:
        self._memory = memory
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._under_way: deque[tuple[int, torch.cuda.Event]] = deque()
        self._bytes = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy that is done after `finish`; the tensor, computed by now, may be given up at once."""
        while self._bytes > LOT:
            nbytes, event = self._under_way.popleft()
            event.synchronize()
            self._bytes -= nbytes
        with torch.cuda.stream(self._stream):
            copy = self._memory.keep(tensor, non_blocking=True)
            tensor.record_stream(self._stream)
            self._under_way.append((tensor.nbytes, torch.cuda.Event()))  # type: ignore[no-untyped-call]
            self._under_way[-1][1].record()
        self._bytes += tensor.nbytes
        return copy

    def finish(self) -> None:
        self._stream.synchronize()


def cells(start: int, end: int) -> Iterator[tuple[int, int]]:
    """[start, end) in spans that each lie in one segment, whoever holds the memory."""
    while start < end:
        stop = min(round_up(start + 1, GRID), end)
        yield start, stop
        start = stop


def hold(memory: HostMemory, tensors: Iterable[tuple[str, Tensor]]) -> tuple[TensorRecord, ...]:
    """Copy every tensor into the memory and compute its checksum where it lies; offsets are places in the memory."""
    found: list[tuple[str, Tensor, int]] = []  # the tensor for its type and shape alone
    checksums: dict[int, int] = {}
    ahead: deque[tuple[int, Future[int]]] = deque()
    leaving = _Leaving()
    with ThreadPoolExecutor(THREADS) as pool:
        for index, (name, tensor) in enumerate(tensors):
            offset, room = memory.take(tensor.nbytes)
            found.append((name, torch.empty_like(tensor, device="meta"), offset))
            if tensor.is_cuda:
                leaving.add(index, tensor, room)
            elif tensor.nbytes < LARGE:
                checksums[index] = _copied(tensor, room)
            else:
                ahead.append((index, pool.submit(_copied, tensor, room)))
            if len(ahead) > 2 * THREADS:
                first, checksum = ahead.popleft()
                checksums[first] = checksum.result()
        checksums |= {index: checksum.result() for index, checksum in ahead}
    checksums |= leaving.finish()
    return tuple(record_of(name, like, offset, checksums[index]) for index, (name, like, offset) in enumerate(found))


def _copied(tensor: Tensor, room: Tensor) -> int:
    """Checksum of a tensor in host memory that is copied there."""
    room.copy_(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8))
    return zlib.crc32(tensor_bytes(room))


class _Leaving:
    """Tensors of a device that are copied from it, beside whatever it computes next.

    What was computed to be sent is kept until it has left, three lots of it.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._lot: list[tuple[int, Tensor, Tensor]] = []
        self._bytes = 0
        self._done: list[tuple[list[int], crc.Begun]] = []
        self._under_way: deque[torch.cuda.Event] = deque()

    def add(self, index: int, tensor: Tensor, room: Tensor) -> None:
        self._lot.append((index, tensor.detach().contiguous(), room))
        self._bytes += tensor.nbytes
        if self._bytes >= LOT:
            self._send()

    def _send(self) -> None:
        lot, self._lot, self._bytes = self._lot, [], 0
        tensors = [tensor for _, tensor, _ in lot]
        device = tensors[0].device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._done.append(([index for index, *_ in lot], crc.begin(tensors)))
        with torch.cuda.stream(self._stream):
            for _, tensor, room in lot:
                room.copy_(tensor.reshape(-1).view(torch.uint8), non_blocking=True)
                tensor.record_stream(self._stream)
            self._under_way.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
            self._under_way[-1].record()
        if len(self._under_way) > 2:
            self._under_way.popleft().synchronize()

    def finish(self) -> dict[int, int]:
        """Index -> checksum, once everything has arrived."""
        if self._lot:
            self._send()
        if self._stream is not None:
            self._stream.synchronize()
        return {
            index: checksum
            for indices, checksums in self._done
            for index, checksum in zip(indices, checksums.result(), strict=True)
        }
