"""zlib's crc32 of many tensors at once, computed on the device where they lie, by table lookups.

A crc is linear: what a byte adds depends on the byte and on how many bytes follow, and what all of them add is combined
by exclusive or. So 64 bytes become 4 by 64 lookups in tables of their place; these states are bytes again, 16 of them
become one in the same way, and so on until one is left. Zeros in front of it all add nothing. What zlib does before the
first byte and after the last is the same for all contents of a length. (Williams, A Painless Guide to CRC Error
Detection Algorithms, 1993.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache

import attrs
import numpy as np
import torch
from torch import Tensor

BLOCK = 64
"""Bytes that one step makes into a state."""
STATE = 4
"""Bytes of a state."""
LOT = 16 << 20
"""Bytes that are looked up together: eight times as much lies beside them meanwhile."""
_POLYNOMIAL = 0xEDB88320  # reflected: bit 31 is x^0
_ONE = 1 << 31


@attrs.frozen(eq=False)
class Begun:
    """Checksums that a device is computing."""

    lots: Sequence[tuple[Sequence[int], Tensor]]
    """Places of tensors among those that were given, and their checksums [places] int64 on the device."""

    def result(self) -> list[int]:
        """In the order in which the tensors were given."""
        found = {
            index: checksum
            for indices, sums in self.lots
            for index, checksum in zip(indices, sums.tolist(), strict=True)
        }
        return [found[index] for index in range(len(found))]


def of_tensors(tensors: Sequence[Tensor]) -> list[int]:
    """zlib.crc32 of the bytes of each tensor, row-major; all are on one device."""
    return begin(tensors).result()


def begin(tensors: Sequence[Tensor]) -> Begun:
    """The same, without waiting for the device, on its current stream."""
    by_size: dict[int, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        by_size[tensor.nbytes].append(index)
    return Begun(
        [
            (lot, _of_equal_lengths([_bytes(tensors[index]) for index in lot], nbytes))
            for nbytes, indices in by_size.items()
            for lot in _lots(indices, max(1, LOT // max(nbytes, 1)))
        ]
    )


def _lots(indices: Sequence[int], count: int) -> Iterable[Sequence[int]]:
    return (indices[start : start + count] for start in range(0, len(indices), count))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _of_equal_lengths(contents: Sequence[Tensor], nbytes: int) -> Tensor:
    """[K] int64 of K contents of so many bytes; a long one is looked up in lots that follow each other."""
    state: Tensor | None = None
    first = nbytes % LOT or min(nbytes, LOT)  # so that all others are full
    for start, end in _edges(nbytes, first):
        rows = torch.stack([content[start:end] for content in contents])
        raw = _raw(rows)
        state = raw if state is None else raw ^ _advanced(state, end - start)
    if state is None:
        return contents[0].new_zeros(len(contents), dtype=torch.int64)
    return (state.long() & 0xFFFFFFFF) ^ _of_zeros(nbytes)


def _edges(nbytes: int, first: int) -> Iterable[tuple[int, int]]:
    if nbytes:
        yield 0, first
    yield from ((start, start + LOT) for start in range(first, nbytes, LOT))


def _raw(rows: Tensor) -> Tensor:
    """[K] int32 states of rows [K, bytes] uint8, from state 0 and without zlib's last step."""
    count = len(rows)
    states = _step(_filled(rows, BLOCK).view(-1, BLOCK), 0).view(count, -1)
    covered = BLOCK
    while states.shape[1] > 1:
        states = _filled(states, BLOCK // STATE)
        states = _step(states.view(torch.uint8).view(-1, BLOCK), covered).view(count, -1)
        covered *= BLOCK // STATE
    return states[:, 0]


def _filled(rows: Tensor, multiple: int) -> Tensor:
    """Zeros in front of each row, up to a multiple of so many elements."""
    missing = -rows.shape[1] % multiple
    return torch.nn.functional.pad(rows, (missing, 0)).contiguous() if missing else rows.contiguous()


def _step(blocks: Tensor, covered: int) -> Tensor:
    """[N] int32 states of blocks [N, 64] uint8: of 64 bytes, or of 16 states that each cover so many bytes."""
    tables, places = _on_device(covered, str(blocks.device))
    found = tables.index_select(0, blocks.int().add_(places).view(-1)).view(-1, BLOCK)
    width = BLOCK
    while width > 1:
        width //= 2
        found[:, :width].bitwise_xor_(found[:, width : 2 * width])
    return found[:, 0].contiguous()


def _advanced(states: Tensor, nbytes: int) -> Tensor:
    """[K] int32 states after so many zero bytes."""
    blocks = torch.zeros((len(states), BLOCK // STATE), dtype=torch.int32, device=states.device)
    blocks[:, -2] = states
    return _step(blocks.view(torch.uint8).view(-1, BLOCK), nbytes)


@cache
def _on_device(covered: int, device: str) -> tuple[Tensor, Tensor]:
    """Tables [64 * 256] int32, and where the table of each place begins [64] int32."""
    places = torch.arange(0, 256 * BLOCK, 256, dtype=torch.int32, device=device)
    return torch.from_numpy(_tables(covered)).to(device), places


@cache
def _tables(covered: int) -> np.ndarray:
    """[64 * 256] int32: what each byte at each place of a block adds; `covered` as of `_step`."""
    tables = np.zeros((BLOCK, 256), np.uint32)
    for place in range(BLOCK):
        if covered:
            unit, byte = divmod(place, STATE)
            shift, follow = 8 * byte, (BLOCK // STATE - 1 - unit) * covered
        else:
            shift, follow = 0, BLOCK - 1 - place
        # A byte is added to the state and the state moved on by a byte; a state has been moved on already.
        power = _power(8 * (follow + (0 if covered else 1)))
        for bit in range(8):
            tables[place, 1 << bit : 2 << bit] = tables[place, : 1 << bit] ^ np.uint32(
                _product(1 << (shift + bit), power)
            )
    return tables.reshape(-1).view(np.int32)


# --- polynomials over two elements, modulo zlib's ---------------------------------------------------------------------
def _of_zeros(nbytes: int) -> int:
    """zlib.crc32 of so many zero bytes."""
    return _product(0xFFFFFFFF, _power(8 * nbytes)) ^ 0xFFFFFFFF


def _power(exponent: int) -> int:
    """x to the exponent."""
    result, square = _ONE, _ONE >> 1
    while exponent:
        if exponent & 1:
            result = _product(result, square)
        square = _product(square, square)
        exponent >>= 1
    return result


def _product(left: int, right: int) -> int:
    result = 0
    while left:
        if left & _ONE:
            result ^= right
        left = (left << 1) & 0xFFFFFFFF
        right = (right >> 1) ^ (_POLYNOMIAL if right & 1 else 0)
    return result
