from __future__ import annotations

import math

import pytest
import torch
from prl.blocks.context import Context
from prl.blocks.rope import RotaryEmbedding, Yarn, rotate
from torch import Tensor

SIZE, THETA = 8, 100.0


def turned(x: Tensor, rope: RotaryEmbedding) -> Tensor:
    context = Context.packed(torch.tensor([0, len(x)]))
    return rotate(x[:, None], rope.tables(context, x.dtype))[:, 0]


def draw(count: int) -> Tensor:
    return torch.randn(count, SIZE, generator=torch.Generator().manual_seed(0))


def test_pairs_turn_by_position_times_frequency() -> None:
    x = draw(20)
    out = turned(x, RotaryEmbedding(SIZE, THETA, interleaved=True))
    for position, (before, after) in enumerate(zip(x, out, strict=True)):
        for pair in range(SIZE // 2):
            angle = position * THETA ** (-2 * pair / SIZE)
            plane = complex(before[2 * pair], before[2 * pair + 1]) * complex(math.cos(angle), math.sin(angle))
            assert after[2 * pair] == pytest.approx(plane.real, abs=1e-5)
            assert after[2 * pair + 1] == pytest.approx(plane.imag, abs=1e-5)


def test_both_conventions_are_one_up_to_the_order_of_dimensions() -> None:
    x = draw(20)
    order = [*range(0, SIZE, 2), *range(1, SIZE, 2)]
    interleaved = turned(x, RotaryEmbedding(SIZE, THETA, interleaved=True))
    torch.testing.assert_close(interleaved[:, order], turned(x[:, order], RotaryEmbedding(SIZE, THETA)))


@pytest.mark.parametrize("interleaved", [False, True])
def test_what_is_compiled_turns_and_differentiates_the_same(interleaved: bool) -> None:
    tables = RotaryEmbedding(SIZE, THETA, interleaved).tables(Context.packed(torch.tensor([0, 20])), torch.float32)
    x = draw(40).view(20, 2, SIZE).requires_grad_()
    wanted = rotate(x, tables)
    seen = torch.compile(rotate, backend="eager", fullgraph=True)(x, tables)
    torch.testing.assert_close(seen, wanted)
    outside = torch.randn_like(wanted)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, outside)[0] for out in (seen, wanted)))


def test_yarn_keeps_fast_dimensions_and_slows_slow_ones() -> None:
    yarn = Yarn(factor=4.0, original_length=64, beta_fast=8.0, beta_slow=1.0)
    plain = 10_000.0 ** -(torch.arange(16) / 16)
    stretched = yarn.stretched(plain, 10_000.0)
    turns = 64 * plain / (2 * math.pi)
    assert torch.equal(stretched[turns > 8], plain[turns > 8])
    # The published code rounds where the slow ones begin up to a whole dimension.
    slow = math.ceil(16 * math.log(64 / (2 * math.pi)) / math.log(10_000.0))
    torch.testing.assert_close(stretched[slow:], plain[slow:] / 4)
    assert bool((stretched.diff() < 0).all())


def test_yarn_of_kimi_k2_sharpens_attention() -> None:
    assert Yarn(factor=64.0, original_length=4096).softmax_factor == pytest.approx(2.0047, abs=1e-4)
    assert Yarn(factor=1.0, original_length=4096).softmax_factor == 1.0
