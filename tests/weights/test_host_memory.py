"""A version in host memory."""

from __future__ import annotations

import zlib

import pytest
import torch
from prl.weights.host_memory import GRID, HostMemory, cells, hold
from prl.weights.tensors import LARGE, tensor_bytes

SIZES = (5, LARGE // 4, 3, 2 * GRID // 4, 7, 0, 100_000)


def weights() -> list[tuple[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [(f"t{index}", torch.randn(size, generator=draw)) for index, size in enumerate(SIZES)]


def test_every_span_of_a_version_is_there_with_its_checksum() -> None:
    memory = HostMemory()
    records = hold(memory, iter(weights()))
    assert [record.name for record in records] == [name for name, _ in weights()]
    for record, (_, tensor) in zip(records, weights(), strict=True):
        spans = [memory.span(*cell) for cell in cells(record.offset, record.offset + record.nbytes)]
        content = b"".join(bytes(tensor_bytes(span)) for span in spans)
        assert content == bytes(tensor_bytes(tensor))
        assert record.checksum == zlib.crc32(content)
        assert record.offset % 64 == 0


def test_what_was_copied_is_not_changed_by_the_trainer() -> None:
    memory = HostMemory()
    tensor = torch.arange(12.0).reshape(3, 4)
    copies = [memory.keep(tensor), memory.keep(tensor.T), memory.keep(tensor[0, 0]), memory.keep(tensor[:0])]
    assert [list(copy.shape) for copy in copies] == [[3, 4], [4, 3], [], [0, 4]]
    tensor.zero_()
    assert copies[0].tolist() == torch.arange(12.0).reshape(3, 4).tolist()
    assert copies[1].equal(copies[0].T)


@pytest.mark.parametrize(("start", "end"), [(-1, 3), (0, 11), (3, 2), (12, 13)])
def test_there_is_nothing_outside(start: int, end: int) -> None:
    memory = HostMemory()
    memory.take(10)
    with pytest.raises(IndexError):
        memory.span(start, end)
    with pytest.raises(IndexError):
        HostMemory().span(0, 1)
