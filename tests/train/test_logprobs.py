"""Chunked log-probabilities and entropy against a plain log_softmax over all logits."""

from __future__ import annotations

import pytest
import torch
from prl.train.logprobs import token_scores
from torch.utils._python_dispatch import TorchDispatchMode

ROWS, WIDTH, VOCAB = 50, 16, 37


def problem(dtype: torch.dtype = torch.float32):
    """Hidden states, head, targets, temperatures and an upstream gradient."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=draw).to(dtype).requires_grad_()
    head = (torch.randn(VOCAB, WIDTH, generator=draw) / WIDTH**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (ROWS,), generator=draw)
    temperatures = torch.rand(ROWS, generator=draw) + 0.5
    return hidden, head, targets, temperatures, torch.randn(ROWS, generator=draw)


def plain(hidden, head, targets, temperatures):
    scores = ((hidden @ head.T).float() / temperatures[:, None]).log_softmax(-1)
    return scores.gather(1, targets[:, None]).squeeze(1), -(scores.exp() * scores).sum(-1)


@pytest.mark.parametrize("chunk", [1, 7, 25, 50, 1000])
def test_values_and_gradients_equal_the_plain_ones(chunk):
    hidden, head, targets, temperatures, upstream = problem()
    scores = token_scores(hidden, head, targets=targets, temperatures=temperatures, chunk=chunk, entropy=True)
    gradients = torch.autograd.grad(scores.logprobs, (hidden, head), upstream)
    logprobs, entropy = plain(hidden, head, targets, temperatures)
    expected = torch.autograd.grad(logprobs, (hidden, head), upstream)
    assert (scores.logprobs - logprobs).abs().max() < 1e-6
    assert (scores.entropy - entropy).abs().max() < 1e-6
    for seen, wanted in zip(gradients, expected, strict=True):
        assert (seen - wanted).norm() / wanted.norm() < 1e-6


def test_the_gradient_is_that_of_finite_differences():
    hidden, head, targets, temperatures, _ = problem()
    args = (hidden[:3].detach().double().requires_grad_(), head[:5].detach().double().requires_grad_())

    def logprobs(hidden, head):
        return token_scores(
            hidden, head, targets=targets[:3] % 5, temperatures=temperatures[:3], chunk=2, entropy=False
        ).logprobs

    # Logits are float32 whatever goes in, which bounds how well differences can agree.
    assert torch.autograd.gradcheck(logprobs, args, eps=1e-2, atol=2e-3, rtol=1e-2)


def test_temperature_zero_counts_as_one():
    hidden, head, targets, _, _ = problem()
    zero, one = (
        token_scores(hidden, head, targets=targets, temperatures=t * torch.ones(ROWS), chunk=8, entropy=False)
        for t in (0.0, 1.0)
    )
    assert torch.equal(zero.logprobs, one.logprobs)


def test_entropy_only_when_asked_for_and_detached():
    hidden, head, targets, temperatures, _ = problem()
    arguments = {"targets": targets, "temperatures": temperatures, "chunk": 8}
    assert token_scores(hidden, head, **arguments, entropy=False).entropy is None
    assert not token_scores(hidden, head, **arguments, entropy=True).entropy.requires_grad


def test_bfloat16_states_give_float32_scores_of_the_rounded_logits():
    hidden, head, targets, temperatures, upstream = problem(torch.bfloat16)
    scores = token_scores(hidden, head, targets=targets, temperatures=temperatures, chunk=8, entropy=False)
    logprobs, _ = plain(hidden, head, targets, temperatures)
    assert scores.logprobs.dtype == torch.float32
    assert (scores.logprobs - logprobs).abs().max() < 1e-6
    assert torch.autograd.grad(scores.logprobs, head, upstream)[0].dtype == torch.bfloat16


def test_no_rows_still_reach_every_parameter():
    hidden, head, targets, temperatures, _ = problem()
    scores = token_scores(hidden[:0], head, targets=targets[:0], temperatures=temperatures[:0], chunk=8, entropy=True)
    scores.logprobs.sum().backward()
    assert torch.equal(head.grad, torch.zeros_like(head))
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operation produced."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.elements = max(self.elements, output.numel())
        return output


def test_no_more_than_a_chunk_of_logits_exists_forward_or_backward():
    hidden, head, targets, temperatures, upstream = problem()
    with LargestTensor() as largest:
        scores = token_scores(hidden, head, targets=targets, temperatures=temperatures, chunk=7, entropy=True)
        scores.logprobs.backward(upstream)
    assert 7 * VOCAB <= largest.elements < ROWS * VOCAB
    assert largest.elements == max(7 * VOCAB, hidden.numel(), head.numel())
