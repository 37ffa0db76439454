"""The blocks with gradients written by hand, against torch's own differentiation of the plain formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from prl.blocks import linear as linear_module
from prl.blocks.linear import Linear, linear
from prl.blocks.mlp import swiglu
from prl.blocks.norm import RMSNorm, rms_norm
from torch import Tensor
from torch.nn import functional


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def plain_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The output, then the gradient of each input against a fixed random direction."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return output.detach(), *torch.autograd.grad(output, leaves, direction)


@pytest.mark.parametrize("weight_shape", [(16,), (3, 16)])
def test_rms_norm_and_its_gradient(weight_shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 3, 16), torch.rand(weight_shape) + 0.5
    own = gradients(lambda x, w: rms_norm(x, w, 1e-6), x, weight)
    plain = gradients(lambda x, w: plain_rms_norm(x, w, 1e-6), x, weight)
    for a, b in zip(own, plain, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, weight, 1e-6), plain[0], atol=1e-6, rtol=1e-6)


def test_rms_norm_gradient_by_finite_differences() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6), (x, weight))


def test_rms_norm_of_bfloat16_is_computed_in_float32() -> None:
    x = torch.full((1, 1024), 0.1).bfloat16()
    exact = plain_rms_norm(x.float(), torch.ones(1024), 1e-6)
    normed = RMSNorm(1024, 1e-6).bfloat16()(x)
    assert normed.dtype is torch.bfloat16
    torch.testing.assert_close(normed.float(), exact.bfloat16().float(), atol=0.0, rtol=0.0)


def test_rms_norm_of_a_zero_vector_is_zero() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    rms_norm(x, torch.ones(8), 1e-6).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_swiglu_and_its_gradient() -> None:
    torch.manual_seed(0)
    gate_up = 3 * torch.randn(7, 20)
    for a, b in zip(gradients(swiglu, gate_up), gradients(plain_swiglu, gate_up), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(swiglu(gate_up), plain_swiglu(gate_up), atol=1e-6, rtol=1e-6)


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product through one kernel, whatever the processor of the machine would choose."""
    if not request.param:
        monkeypatch.setattr(linear_module, "_ONEDNN", False)
    monkeypatch.setattr(linear_module, "_ONEDNN_MIN_PRODUCTS", 1)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(3, 8, 5), (600, 64, 96), (600, 96, 64), (0, 8, 5)])
def test_linear_and_its_gradient(rows: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    for a, b in zip(gradients(linear, x, weight), gradients(functional.linear, x, weight), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-5)
        assert a.is_contiguous()


@pytest.mark.usefixtures("kernel")
def test_linear_of_views_and_of_frozen_weights() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 1200).t()[:1100], torch.randn(128, 64).t().contiguous().t()
    torch.testing.assert_close(linear(x, weight), x @ weight.t(), atol=1e-4, rtol=1e-5)
    trained = weight.clone().requires_grad_()
    linear(x, trained).sum().backward()
    assert trained.grad is not None
    torch.testing.assert_close(trained.grad, x.sum(0).expand(128, -1), atol=1e-3, rtol=1e-4)


def test_a_linear_layer_has_no_bias() -> None:
    assert [name for name, _ in Linear(4, 3).named_parameters()] == ["weight"]
