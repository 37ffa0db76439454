"""Log-probabilities and entropy of given tokens from hidden states, a chunk of logits at a time.

No tensor of more than `chunk` rows of logits exists, forward or backward: the forward pass keeps only one number per
token and the backward pass computes each chunk's logits again (one more matrix product, the price of the memory; the
scheme is that of Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009, in plain
torch). Called by `prl.train.step`; knows nothing of losses or batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor

from prl.blocks.linear import linear


class TokenScores(NamedTuple):
    """What is known of `N` predicted tokens."""

    logprobs: Tensor  # [N] float32; carries the gradient
    entropy: Tensor | None  # [N] float32, detached, of the distribution each token was drawn from


@attrs.frozen
class _Kernels:
    """The work on one chunk, as torch does it or compiled into a few passes over the logits."""

    scores: Callable[[Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def token_scores(
    hidden: Tensor,
    head: Tensor,
    *,
    targets: Tensor,
    temperatures: Tensor,
    chunk: int,
    entropy: bool,
    compiled: bool = False,
) -> TokenScores:
    """Score `targets` [N] int64 under softmax(hidden @ head.T / temperature).

    hidden [N, D] are the states that predict the targets, head is [vocab, D], temperatures [N] (0, greedy, counts as
    1). Logits are float32 whatever the dtype of hidden. With N = 0 the result is still connected to hidden and head.
    """
    temperatures = torch.where(temperatures > 0, temperatures, 1.0).unsqueeze(1)
    score = _TokenScores.apply
    kernels = _compiled() if compiled else _Kernels(_chunk_scores, _chunk_gradient)
    logprobs, entropies = score(hidden, head, targets.unsqueeze(1), temperatures, chunk, entropy, kernels)  # type: ignore[no-untyped-call]
    return TokenScores(logprobs, entropies if entropy else None)


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        temperatures: Tensor,
        chunk: int,
        entropy: bool,
        kernels: _Kernels,
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropies = torch.empty_like(logprobs) if entropy else logprobs.new_empty(0)
        for rows in _chunks(len(hidden), chunk):
            found, spread = kernels.scores(hidden[rows], head, targets[rows], temperatures[rows], entropy)
            logprobs[rows] = found
            if spread is not None:
                entropies[rows] = spread
        ctx.save_for_backward(hidden, head, targets, temperatures)
        ctx.chunk, ctx.kernels = chunk, kernels
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, targets, temperatures = ctx.saved_tensors
        grad = grad.unsqueeze(1)
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
        for rows in _chunks(len(hidden), ctx.chunk):
            grad_logits = ctx.kernels.gradient(hidden[rows], head, targets[rows], temperatures[rows], grad[rows])
            grad_hidden[rows] = linear(grad_logits, head.t())
            grad_head += linear(grad_logits.t(), hidden[rows].t())
        return grad_hidden, grad_head, None, None, None, None, None


def _chunk_scores(
    hidden: Tensor, head: Tensor, targets: Tensor, temperatures: Tensor, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """([n] log-probabilities, [n] entropies where they are asked for)"""
    scores = _log_softmax(hidden, head, temperatures)
    spread = -torch.linalg.vecdot(scores.exp(), scores) if entropy else None
    return scores.gather(1, targets).squeeze(1), spread


def _chunk_gradient(hidden: Tensor, head: Tensor, targets: Tensor, temperatures: Tensor, grad: Tensor) -> Tensor:
    """[n, vocab] gradient of the logits, d logprob / d logits = (onehot - softmax) / temperature."""
    grad_logits = _log_softmax(hidden, head, temperatures).exp_().mul_(-grad)
    grad_logits.scatter_add_(1, targets, grad)
    return grad_logits.div_(temperatures).to(head.dtype)


def _fused_gradient(hidden: Tensor, head: Tensor, targets: Tensor, temperatures: Tensor, grad: Tensor) -> Tensor:
    """The same without a scatter, which no compiler fuses with what comes before it."""
    softmax = _log_softmax(hidden, head, temperatures).exp()
    hit = torch.arange(softmax.shape[1], device=softmax.device) == targets
    return ((hit.float() - softmax) * (grad / temperatures)).to(head.dtype)


@functools.cache
def _compiled() -> _Kernels:
    return _Kernels(torch.compile(_chunk_scores), torch.compile(_fused_gradient))


def _chunks(rows: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, rows, chunk)]


def _log_softmax(hidden: Tensor, head: Tensor, temperatures: Tensor) -> Tensor:
    """[n, vocab] float32, a tensor of its own that may be overwritten."""
    return torch.log_softmax(linear(hidden, head).float().div_(temperatures), dim=-1)
