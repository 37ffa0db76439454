"""Tensors to bytes and back: exact, verified, readable by others."""

from __future__ import annotations

import zlib

import attrs
import pytest
import torch
from prl.errors import InfrastructureError, RunError
from prl.types import TensorRecord
from prl.weights.tensors import (
    LARGE,
    LOT,
    THREADS,
    lots,
    read_tensors,
    tensor_bytes,
    write_atomically,
    write_raw,
    write_safetensors,
)
from safetensors.torch import load_file

WRITERS = [write_raw, write_safetensors]


def assorted() -> list[tuple[str, torch.Tensor]]:
    """Every width, views that share storage, a transposed one, a scalar, an empty one."""
    matrix = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    return [
        ("rows.0", matrix[:3]),
        ("rows.1", matrix[3:]),
        ("transposed", matrix.T),
        ("bfloat16", matrix.to(torch.bfloat16)),
        ("float8", matrix.to(torch.float8_e4m3fn)),
        ("scalar", torch.tensor(2.5)),
        ("empty", torch.empty(0, 3)),
        ("integers", torch.arange(5)),
        ("mask", matrix > 0),
        ("parameter", torch.nn.Parameter(matrix[:1])),
    ]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and bytes(tensor_bytes(a)) == bytes(tensor_bytes(b))


@pytest.mark.parametrize("write", WRITERS)
def test_round_trip_is_exact(tmp_path, write):
    records = write_atomically(tmp_path / "weights", write, iter(assorted()))
    seen = dict(read_tensors(tmp_path / "weights", records, what="version 1"))
    assert seen.keys() == dict(assorted()).keys()
    assert all(same(seen[name], tensor) for name, tensor in assorted())
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_records_say_where_and_what(tmp_path):
    content = torch.arange(4, dtype=torch.float32)
    first, second = write_atomically(tmp_path / "weights", write_raw, [("a", content[:3]), ("b", content)])
    assert (first.offset, first.nbytes, second.offset, second.nbytes) == (0, 12, 64, 16)
    assert (second.dtype, second.shape, second.checksum) == ("float32", (4,), zlib.crc32(content.numpy().tobytes()))


def large() -> list[tuple[str, torch.Tensor]]:
    """Enough for several threads, among tensors that need none, after which sizes are no multiple of the alignment."""
    draw = torch.Generator().manual_seed(0)
    sizes = [LARGE // 4 + n for n in range(3 * THREADS)]
    return [
        (f"{kind}.{n}", torch.randn(count, generator=draw))
        for n, size in enumerate(sizes)
        for kind, count in (("large", size), ("small", 3))
    ]


def test_several_threads_write_and_read_what_one_would(tmp_path):
    records = write_atomically(tmp_path / "weights", write_raw, iter(large()))
    assert [record.name for record in records] == [name for name, _ in large()]
    ends = [record.offset + record.nbytes for record in records]
    assert all(0 <= after.offset - end < 64 for after, end in zip(records[1:], ends, strict=False))
    assert all(record.checksum == zlib.crc32(tensor_bytes(t)) for record, (_, t) in zip(records, large(), strict=True))
    seen = list(read_tensors(tmp_path / "weights", records, what="version 1"))
    assert all(name == known and same(t, content) for (name, t), (known, content) in zip(seen, large(), strict=True))


def test_one_damaged_byte_among_large_tensors_is_named(tmp_path):
    records = write_atomically(tmp_path / "weights", write_raw, large())
    damaged = next(record for record in records if record.name == "large.5")
    with (tmp_path / "weights").open("r+b") as file:
        file.seek(damaged.offset + 7)
        file.write(b"!")
    with pytest.raises(InfrastructureError, match=r"version 1: tensor large\.5 has checksum"):
        dict(read_tensors(tmp_path / "weights", records, what="version 1"))


def test_a_safetensors_file_is_one_for_everybody(tmp_path):
    write_atomically(tmp_path / "x.safetensors", write_safetensors, assorted())
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(same(loaded[name], tensor) for name, tensor in assorted())


def test_a_dtype_safetensors_does_not_know(tmp_path):
    with pytest.raises(RunError, match=r"tensor z is torch\.complex64"):
        write_atomically(tmp_path / "x", write_safetensors, [("z", torch.zeros(2, dtype=torch.complex64))])
    assert list(tmp_path.iterdir()) == []


def test_tensors_outlive_their_file_and_may_be_written_to(tmp_path):
    path = tmp_path / "weights"
    records = write_atomically(path, write_raw, [("a", torch.ones(1000))])
    ((_, seen),) = read_tensors(path, records, what="version 1")
    ((_, other),) = read_tensors(path, records, what="version 1")
    path.unlink()
    seen.mul_(2)
    assert seen.sum() == 2000
    assert other.sum() == 1000


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "weights"
    records = write_atomically(path, write_raw, [("a", torch.ones(3))])

    def broken():
        yield "a", torch.zeros(3)
        raise RuntimeError("the model broke")

    with pytest.raises(RuntimeError, match="the model broke"):
        write_atomically(path, write_raw, broken())
    ((_, seen),) = read_tensors(path, records, what="version 1")
    assert seen.tolist() == [1, 1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


@pytest.mark.parametrize("write", WRITERS)
def test_a_flipped_byte_is_named(tmp_path, write):
    path = tmp_path / "weights"
    records = write_atomically(path, write, [("a", torch.ones(8)), ("b", torch.ones(8))])
    content = bytearray(path.read_bytes())
    content[records[1].offset + 5] ^= 0x10
    path.write_bytes(content)
    reader = read_tensors(path, records, what="weights of version 4")
    assert next(reader)[0] == "a"
    with pytest.raises(InfrastructureError, match="weights of version 4: tensor b has checksum"):
        next(reader)


def test_a_file_cut_short_is_named(tmp_path):
    path = tmp_path / "weights"
    records = write_atomically(path, write_raw, [("a", torch.ones(8))])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InfrastructureError, match="version 4: tensor a ends at byte 32, the file at byte 31"):
        list(read_tensors(path, records, what="version 4"))
    path.write_bytes(b"")
    with pytest.raises(InfrastructureError, match="version 4: tensor a ends at byte 32, the file at byte 0"):
        list(read_tensors(path, records, what="version 4"))


@pytest.mark.parametrize("changes", [{"dtype": "float7"}, {"dtype": "load"}, {"shape": (9,)}, {"offset": -4}], ids=str)
def test_a_record_that_contradicts_itself_is_refused(tmp_path, changes):
    path = tmp_path / "weights"
    (record,) = write_atomically(path, write_raw, [("a", torch.ones(8))])
    with pytest.raises(InfrastructureError, match="the record of tensor a contradicts itself"):
        list(read_tensors(path, [attrs.evolve(record, **changes)], what="version 4"))


def test_a_file_that_is_gone(tmp_path):
    with pytest.raises(InfrastructureError, match=r"version 4: .*weights is gone"):
        list(read_tensors(tmp_path / "weights", [], what="version 4"))


def test_lots_are_what_lies_side_by_side_in_one_piece_of_memory() -> None:
    def record(name: str, offset: int, nbytes: int) -> TensorRecord:
        return TensorRecord(name=name, dtype="uint8", shape=(nbytes,), offset=offset, nbytes=nbytes, checksum=0)

    def named(*records: TensorRecord, starts: tuple[int, ...] = ()) -> list[str]:
        return ["".join(one.name for one in lot) for lot in lots(records, starts)]

    near = record("b", 64, 10), record("a", 0, 10), record("e", 64, 0), record("c", 128, 64)
    assert named() == []
    assert named(*near) == ["aebc"]
    assert named(*near, record("d", 192 + 64, 10)) == ["aebc", "d"]
    assert named(*near, starts=(0, 128)) == ["aeb", "c"]
    assert named(record("a", 0, LOT), record("b", LOT, 1), record("c", LOT + 64, LOT)) == ["a", "b", "c"]
