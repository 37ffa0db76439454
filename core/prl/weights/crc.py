"""zlib's crc32 of many tensors at once, computed on the device where they lie, by table lookups.

A crc is linear: what a byte adds depends on the byte and on how many bytes follow, and what all of them add is combined
by exclusive or. So 64 bytes become 4 by 64 lookups in tables of their place; these states are bytes again, 16 of them
become one in the same way, and so on until one is left. Zeros in front of it all add nothing. What zlib does before the
first byte and after the last is the same for all contents of a length. (Williams, A Painless Guide to CRC Error
Detection Algorithms, 1993.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache

import attrs
import numpy as np
import torch
from torch import Tensor

BLOCK = 64
"""Bytes that one step makes into a state."""
STATE = 4
"""Bytes of a state."""
COVERED = BLOCK * BLOCK // STATE
"""Bytes of which two steps leave one state: what is left of all tensors then is small, and is done together."""
LOT = 32 << 20
"""Bytes that are looked up together: eight times as much lies beside them meanwhile."""
_POLYNOMIAL = 0xEDB88320  # reflected: bit 31 is x^0
_ONE = 1 << 31


@attrs.frozen(eq=False)
class Begun:
    """Checksums that a device is computing."""

    sizes: Sequence[int]
    """Bytes of each tensor."""
    lots: Sequence[tuple[Sequence[int], Tensor]]
    """Places of tensors among those that were given, and their last states [places] int32 on the device."""

    def result(self) -> list[int]:
        """In the order in which the tensors were given."""
        found = {}
        for indices, states in self.lots:
            for index, state in zip(indices, states.tolist(), strict=True):
                found[index] = (state & 0xFFFFFFFF) ^ _of_zeros(self.sizes[index])
        return [found[index] for index in range(len(self.sizes))]


def of_tensors(tensors: Sequence[Tensor]) -> list[int]:
    """zlib.crc32 of the bytes of each tensor, row-major; all are on one device."""
    return begin(tensors).result()


def begin(tensors: Sequence[Tensor]) -> Begun:
    """The same, without waiting for the device, on its current stream."""
    by_size: dict[int, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        by_size[tensor.nbytes].append(index)
    rows: dict[int, list[tuple[Sequence[int], Tensor]]] = defaultdict(list)  # steps to go -> places, states [places, M]
    for nbytes, indices in by_size.items():
        count = max(1, LOT // max(nbytes, 1))
        for places in (indices[first : first + count] for first in range(0, len(indices), count)):
            states = _states([_bytes(tensors[place]) for place in places], nbytes)
            rows[_steps(states.shape[1])].append((places, states))
    return Begun([tensor.nbytes for tensor in tensors], [_last_states(steps, some) for steps, some in rows.items()])


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _states(contents: Sequence[Tensor], nbytes: int) -> Tensor:
    """[K, M] int32 states of K contents of so many bytes, of `COVERED` bytes each, in lots that follow each other."""
    first = nbytes % LOT or min(nbytes, LOT)  # so that all others are full
    edges = [(0, first), *((start, start + LOT) for start in range(first, nbytes, LOT))]
    return torch.cat([_two_steps(torch.stack([content[a:b] for content in contents])) for a, b in edges], 1)


def _two_steps(rows: Tensor) -> Tensor:
    """[K, M] int32 of rows [K, bytes] uint8."""
    states = _step(_filled(rows, BLOCK).view(-1, BLOCK), 0).view(len(rows), -1)
    return _joined(states, BLOCK)


def _last_states(steps: int, rows: Sequence[tuple[Sequence[int], Tensor]]) -> tuple[list[int], Tensor]:
    """Places and their states [places] int32, where so many steps leave one of each row [M]."""
    width = max(states.shape[1] for _, states in rows)
    states = torch.cat([torch.nn.functional.pad(some, (width - some.shape[1], 0)) for _, some in rows])
    covered = COVERED
    for _ in range(steps):
        states = _joined(states, covered)
        covered *= BLOCK // STATE
    return [place for places, _ in rows for place in places], states[:, 0]


def _steps(states: int) -> int:
    """Until one is left."""
    steps = 0
    while states > 1:
        states, steps = -(-states * STATE // BLOCK), steps + 1
    return steps


def _joined(states: Tensor, covered: int) -> Tensor:
    """[K, M / 16] int32 of states [K, M] that cover so many bytes each."""
    blocks = _filled(states, BLOCK // STATE).view(torch.uint8).view(-1, BLOCK)
    return _step(blocks, covered).view(len(states), -1)


def _filled(rows: Tensor, multiple: int) -> Tensor:
    """Zeros in front of each row, up to a multiple of so many elements, one at least."""
    missing = -rows.shape[1] % multiple if rows.shape[1] else multiple
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
@cache
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
