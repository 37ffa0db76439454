"""zlib's checksum, computed where tensors lie; here on the CPU, by what GPUs compute it by too."""

from __future__ import annotations

import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prl.weights import crc
from prl.weights.tensors import tensor_bytes


def expected(tensors: list[torch.Tensor]) -> list[int]:
    return [zlib.crc32(tensor_bytes(tensor)) for tensor in tensors]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=200), st.binary(min_size=1000, max_size=5000)), max_size=6))
def test_it_is_zlibs_of_any_bytes(contents: list[bytes]) -> None:
    tensors = [
        torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0) for content in contents
    ]
    assert crc.of_tensors(tensors) == [zlib.crc32(content) for content in contents]


def test_tensors_of_any_type_and_layout() -> None:
    draw = torch.Generator().manual_seed(0)
    whole = torch.randn(64, 33, generator=draw)
    tensors = [whole, whole.T, whole[:, ::2], whole.bfloat16(), whole.to(torch.float8_e4m3fn), whole[0, 0], whole > 0]
    assert crc.of_tensors(tensors) == expected(tensors)


@pytest.mark.parametrize("nbytes", [4096, 4097, 3 * 4096, 20_011])
def test_one_that_is_larger_than_a_lot(nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crc, "LOT", 4096)
    tensors = [torch.randint(256, (nbytes,), dtype=torch.uint8) for _ in range(2)]
    assert crc.of_tensors(tensors) == expected(tensors)
