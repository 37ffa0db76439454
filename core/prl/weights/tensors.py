"""Tensors as bytes in a file: written once with a checksum each, read back where they lie.

The weight transports of one host or file system (`shared_memory`, `disk`) and the trainer's checkpoints share these
functions. A file that is removed while its tensors are in use stays readable: the memory map keeps it.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Protocol, TypeAlias

import torch
from torch import Tensor

from prl.errors import InfrastructureError, RunError
from prl.types import TensorRecord
from prl.weights import crc


class Output(Protocol):
    """A file that is being written."""

    def write(self, content: bytes | memoryview, /) -> int: ...

    def tell(self) -> int: ...


Writer: TypeAlias = Callable[[BinaryIO, Iterable[tuple[str, Tensor]]], tuple[TensorRecord, ...]]
"""`write_raw` or `write_safetensors`."""
ALIGNMENT = 64
LOT = 128 << 20
"""Bytes that are brought and verified together."""
THREADS = min(8, os.cpu_count() or 1)
"""Copies and checksums of large tensors: one thread does about 1 GB/s of both."""
LARGE = 1 << 18
"""Bytes of a tensor from which another thread is worth its while."""
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def round_up(number: int, multiple: int = ALIGNMENT) -> int:
    """The next multiple, or the number itself."""
    return -(-number // multiple) * multiple


def lots(records: Sequence[TensorRecord], starts: Sequence[int] = ()) -> Iterator[list[TensorRecord]]:
    """Records in the order of their bytes, by what lies side by side but for alignment; at most `LOT` bytes if not one
    tensor has more. `starts`, ascending: where pieces of the memory begin; no lot is of two."""
    lot: list[TensorRecord] = []
    for record in sorted(records, key=lambda record: (record.offset, record.nbytes)):
        if lot:
            first, end = lot[0].offset, lot[-1].offset + lot[-1].nbytes
            apart = record.offset - end >= ALIGNMENT or record.offset + record.nbytes - first > LOT
            if apart or bisect_right(starts, first) != bisect_right(starts, record.offset):
                yield lot
                lot = []
        lot.append(record)
    if lot:
        yield lot


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major; no copy for a contiguous tensor on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def write_raw(file: BinaryIO, tensors: Iterable[tuple[str, Tensor]]) -> tuple[TensorRecord, ...]:
    """One tensor after the other, each at a multiple of 64 bytes; large ones by several threads, a few at a time."""
    file.flush()
    records: list[TensorRecord] = []
    ahead: deque[Future[TensorRecord] | TensorRecord] = deque()
    end = file.tell()
    with ThreadPoolExecutor(THREADS) as pool:
        for name, tensor in tensors:
            offset = round_up(end)
            end = offset + tensor.nbytes
            arguments = (file.fileno(), offset, name, tensor)
            ahead.append(pool.submit(_write_at, *arguments) if tensor.nbytes >= LARGE else _write_at(*arguments))
            if len(ahead) > 2 * THREADS:
                records.append(_done(ahead.popleft()))
        records += map(_done, ahead)
    return tuple(records)


def _done(record: Future[TensorRecord] | TensorRecord) -> TensorRecord:
    return record.result() if isinstance(record, Future) else record


def _write_at(descriptor: int, offset: int, name: str, tensor: Tensor) -> TensorRecord:
    content = tensor_bytes(tensor)
    written = 0
    while written < content.nbytes:
        written += os.pwrite(descriptor, content[written:], offset + written)
    return record_of(name, tensor, offset, zlib.crc32(content))


def write_safetensors(file: Output, tensors: Iterable[tuple[str, Tensor]]) -> tuple[TensorRecord, ...]:
    """A safetensors file that any reader of the format understands; the tensors are held until all are known."""
    held = sorted(tensors, key=lambda item: -item[1].element_size())  # no gaps allowed, so wide elements go first
    header = safetensors_header(held)
    file.write(len(header).to_bytes(8, "little") + header)
    return tuple(_append(file, held, alignment=1))


def write_atomically(path: Path, write: Writer, tensors: Iterable[tuple[str, Tensor]]) -> tuple[TensorRecord, ...]:
    """`write` the tensors into a new file that takes the place of `path` once it is whole."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            records = write(file, tensors)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return records


def inside(folder: Path, location: str, *, what: str) -> Path:
    """The file at `location`, which came over a wire; InfrastructureError unless it is in `folder`, links followed."""
    try:
        path = Path(location).resolve()
    except (OSError, ValueError) as error:
        raise InfrastructureError(f"{what}: {location!r:.200} is no path: {error!s:.200}") from None
    if not path.is_relative_to(folder.resolve()):
        raise InfrastructureError(f"{what}: {location!r:.200} is not in {folder}, where weights are read from")
    return path


def read_tensors(path: Path, records: Sequence[TensorRecord], *, what: str) -> Iterator[tuple[str, Tensor]]:
    """Every recorded tensor, verified, as a view of the file mapped into memory (private: writing to it is allowed).

    Raises:
        InfrastructureError: names `what` and the tensor that is cut short or whose bytes have another checksum.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if size else b"")
    except FileNotFoundError:
        raise InfrastructureError(f"{what}: {path} is gone") from None
    except OSError as error:
        raise InfrastructureError(f"{what} cannot be read: {error}") from None
    yield from verified(content, records, what=what)


def verified(
    content: memoryview, records: Sequence[TensorRecord], *, what: str, start: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Every recorded tensor as a view of these bytes, of which byte `start` is the first; raises as `read_tensors`."""
    if sum(record.nbytes for record in records) < THREADS * LARGE:
        for record in records:
            yield record.name, _read(content, record, what, start)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        read = [(record.name, pool.submit(_read, content, record, what, start)) for record in records]
        try:
            for name, tensor in read:
                yield name, tensor.result()
        finally:
            pool.shutdown(cancel_futures=True)


def verified_on_device(
    content: Tensor, records: Sequence[TensorRecord], *, what: str, start: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """As `verified`, of bytes [N] uint8 on a device, where the checksums are computed."""
    tensors = []
    for record in records:
        dtype, first = _place(record, len(content), what, start)
        tensors.append(content[first : first + record.nbytes].view(dtype).reshape(record.shape))
    for record, tensor, seen in zip(records, tensors, crc.of_tensors(tensors), strict=True):
        _expect(record, seen, what)
        yield record.name, tensor


def _read(content: memoryview, record: TensorRecord, what: str, start: int) -> Tensor:
    dtype, first = _place(record, len(content), what, start)
    if record.nbytes == 0:
        return torch.empty(record.shape, dtype=dtype)
    _expect(record, zlib.crc32(content[first : first + record.nbytes]), what)
    count = record.nbytes // dtype.itemsize
    return torch.frombuffer(content, dtype=dtype, count=count, offset=first).reshape(record.shape)


def _place(record: TensorRecord, size: int, what: str, start: int) -> tuple[torch.dtype, int]:
    """Type of a recorded tensor, and where it begins in so many bytes from byte `start` on."""
    dtype = getattr(torch, record.dtype, None)
    sound = min((record.offset, *record.shape)) >= 0
    if not isinstance(dtype, torch.dtype) or not sound or math.prod(record.shape) * dtype.itemsize != record.nbytes:
        raise InfrastructureError(f"{what}: the record of tensor {record.name} contradicts itself: {record}")
    if not start <= record.offset <= record.offset + record.nbytes <= start + size:
        end = record.offset + record.nbytes
        raise InfrastructureError(f"{what}: tensor {record.name} ends at byte {end}, the file at byte {start + size}")
    return dtype, record.offset - start


def _expect(record: TensorRecord, seen: int, what: str) -> None:
    if seen != record.checksum:
        raise InfrastructureError(
            f"{what}: tensor {record.name} has checksum {seen:08x} where {record.checksum:08x} was written"
        )


def _append(file: Output, tensors: Iterable[tuple[str, Tensor]], *, alignment: int) -> Iterator[TensorRecord]:
    for name, tensor in tensors:
        file.write(b"\0" * (-file.tell() % alignment))
        offset, content = file.tell(), tensor_bytes(tensor)
        file.write(content)
        yield record_of(name, tensor, offset, zlib.crc32(content))


def record_of(name: str, tensor: Tensor, offset: int, checksum: int) -> TensorRecord:
    return TensorRecord(
        name=name,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        offset=offset,
        nbytes=tensor.nbytes,
        checksum=checksum,
    )


def safetensors_header(tensors: Sequence[tuple[str, Tensor]], *, metadata: Mapping[str, str] | None = None) -> bytes:
    """What comes after a file's first eight bytes, for tensors that lie one after the other in this order."""
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    start = 0
    for name, tensor in tensors:
        end = start + tensor.numel() * tensor.element_size()
        dtype = SAFETENSORS_DTYPES.get(tensor.dtype)
        if dtype is None:
            raise RunError(f"tensor {name} is {tensor.dtype}, which a safetensors file cannot hold")
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries).encode()
    return text + b" " * (-len(text) % 8)
