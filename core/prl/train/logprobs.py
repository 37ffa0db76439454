"""Log-probabilities and entropy of given tokens from hidden states, a chunk of logits at a time.

No tensor of more than `chunk` rows of logits exists, forward or backward: the forward pass keeps only one number per
token and the backward pass computes each chunk's logits again (one more matrix product, the price of the memory; the
scheme is that of Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009, in plain
torch). Called by `prl.train.step`; knows nothing of losses or batches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from prl.blocks.linear import linear


class TokenScores(NamedTuple):
    """What is known of `N` predicted tokens."""

    logprobs: Tensor  # [N] float32; carries the gradient
    entropy: Tensor | None  # [N] float32, detached, of the distribution each token was drawn from


def token_scores(
    hidden: Tensor, head: Tensor, *, targets: Tensor, temperatures: Tensor, chunk: int, entropy: bool
) -> TokenScores:
    """Score `targets` [N] int64 under softmax(hidden @ head.T / temperature).

    hidden [N, D] are the states that predict the targets, head is [vocab, D], temperatures [N] (0, greedy, counts as
    1). Logits are float32 whatever the dtype of hidden. With N = 0 the result is still connected to hidden and head.
    """
    temperatures = torch.where(temperatures > 0, temperatures, 1.0).unsqueeze(1)
    score = _TokenScores.apply
    logprobs, entropies = score(hidden, head, targets.unsqueeze(1), temperatures, chunk, entropy)  # type: ignore[no-untyped-call]
    return TokenScores(logprobs, entropies if entropy else None)


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, temperatures: Tensor, chunk: int, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropies = torch.empty_like(logprobs) if entropy else logprobs.new_empty(0)
        for rows in _chunks(len(hidden), chunk):
            scores = _log_softmax(hidden[rows], head, temperatures[rows])
            logprobs[rows] = scores.gather(1, targets[rows]).squeeze(1)
            if entropy:
                entropies[rows] = -torch.linalg.vecdot(scores.exp(), scores)
        ctx.save_for_backward(hidden, head, targets, temperatures)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, targets, temperatures = ctx.saved_tensors
        grad = grad.unsqueeze(1)
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
        for rows in _chunks(len(hidden), ctx.chunk):
            # d logprob / d logits = (onehot - softmax) / temperature
            grad_logits = _log_softmax(hidden[rows], head, temperatures[rows]).exp_().mul_(-grad[rows])
            grad_logits.scatter_add_(1, targets[rows], grad[rows])
            grad_logits = grad_logits.div_(temperatures[rows]).to(head.dtype)
            grad_hidden[rows] = linear(grad_logits, head.t())
            grad_head += linear(grad_logits.t(), hidden[rows].t())
        return grad_hidden, grad_head, None, None, None, None


def _chunks(rows: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, rows, chunk)]


def _log_softmax(hidden: Tensor, head: Tensor, temperatures: Tensor) -> Tensor:
    """[n, vocab] float32, a tensor of its own that may be overwritten."""
    return torch.log_softmax(linear(hidden, head).float().div_(temperatures), dim=-1)
