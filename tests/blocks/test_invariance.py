"""Rows of products inside `batch_invariant`: the same bits alone and beside any others."""

from __future__ import annotations

import pytest
import torch
from prl.blocks import invariance
from prl.blocks.invariance import batch_invariant
from prl.blocks.linear import linear


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("sizes", [(16, 40), (128, 60), (128, 512), (512, 1536)])
def test_a_row_does_not_depend_on_the_others(sizes):
    wide, out = sizes
    torch.manual_seed(0)
    weight, x = torch.randn(out, wide), torch.randn(200, wide)
    with batch_invariant(True):
        whole = linear(x, weight)
        for count in (1, 2, 3, 4, 5, 8, 13, 31, 64, 100):
            for start in (0, 1, 7, 90):
                assert torch.equal(linear(x[start : start + count], weight), whole[start : start + count])
    torch.testing.assert_close(whole, x @ weight.T, atol=5e-4, rtol=1e-4)


def test_gradients_and_empty_products_are_left_alone():
    weight, x = torch.randn(5, 3, requires_grad=True), torch.randn(2, 3)
    with batch_invariant(True):
        assert linear(x[:0], weight).shape == (0, 5)
        linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 3))


def test_it_ends_with_its_block_and_can_be_declined():
    with batch_invariant(False):
        assert not invariance.wanted()
        with batch_invariant(True):
            assert invariance.wanted()
        assert not invariance.wanted()
