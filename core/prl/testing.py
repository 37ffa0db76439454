"""For authors of plugins: checks of the contracts that `prl.providers` states in words.

    from prl.testing import check_loss

    def test_my_loss():
        check_loss(my_loss(MyConfig()))

A check raises AssertionError with a sentence that says which clause is broken and by how much. Imports torch; nothing
in a run imports this module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from prl.errors import InfrastructureError
from prl.providers import LossFunction, LossOutput, WeightReceiver, WeightSender
from prl.train.streams import LossBatch
from prl.types import Manifest


def loss_inputs(
    *, tokens: int = 64, samples: int = 8, seed: int = 0, needs: frozenset[str] = frozenset(), spread: float = 0.1
) -> LossBatch:
    """Random inputs of a loss: `samples` samples of `tokens` tokens in all, a quarter of them outside the stream.

    Trainer and engine log-probabilities differ by about `spread`. Optional inputs are there when `needs` names them.
    """
    draw = torch.Generator().manual_seed(seed)
    trainer_logprobs = -torch.rand(tokens, generator=draw) * 3 - 0.05
    engine_logprobs = (trainer_logprobs + spread * torch.randn(tokens, generator=draw)).clamp(max=-1e-3)
    sample_ids = torch.arange(tokens) * samples // tokens
    weights = (torch.rand(tokens, generator=draw) < 0.75) * (0.5 + torch.rand(tokens, generator=draw))
    return LossBatch(
        trainer_logprobs=trainer_logprobs,
        engine_logprobs=engine_logprobs,
        advantages=torch.randn(samples, generator=draw)[sample_ids],
        weights=weights,
        sample_ids=sample_ids,
        sample_count=samples,
        staleness=torch.randint(0, 3, (tokens,), generator=draw),
        entropy=torch.rand(tokens, generator=draw) if "entropy" in needs else None,
        ref_logprobs=-torch.rand(tokens, generator=draw) * 3 if "ref_logprobs" in needs else None,
    )


def check_loss(
    function: LossFunction, *, needs: frozenset[str] = frozenset(), on_policy_gradient: bool = False
) -> None:
    """Assert the contract of a loss function (`prl.providers.LossFunction`).

    `needs` as its provider declares it. `on_policy_gradient`: also assert that where trainer and engine agree the
    gradient is that of the plain policy gradient, -weight x advantage per token.
    """
    inputs = loss_inputs(needs=needs)
    _check_output(function, inputs)
    _check_zero_weights(function, inputs)
    _check_sum(function, inputs)
    _check_packing(function, inputs)
    _check_weights(function, inputs)
    _check_extremes(function, inputs)
    if on_policy_gradient:
        _check_on_policy_gradient(function, inputs)


def check_weight_transport(send: Callable[[int], WeightSender], receiver: WeightReceiver) -> None:
    """Assert the contract of a weight transport (`prl.providers.WeightTransport`).

    `send(rank)` is the sender of a trainer rank; two of them send a version in two parts.
    """
    senders = [send(0), send(1)]
    parts = [_sent(sender, rank, version=1) for rank, sender in enumerate(senders)]
    manifest = Manifest(version=1, parts=tuple(part for manifest in parts for part in manifest.parts))
    expected = {**_weights(0, 1), **_weights(1, 1)}
    for _ in range(2):
        _check_fetched(dict(receiver.fetch(manifest)), expected)
    _check_parts_of(receiver, manifest, expected)
    kept = dict(receiver.fetch(manifest))
    next(kept[name] for name in kept if kept[name].numel()).zero_()  # what an engine does with them is its own affair
    _check_fetched(dict(receiver.fetch(manifest)), expected)
    again = senders[0].send(1, _weights(0, 9).items())
    _check_fetched(dict(receiver.fetch(again)), _weights(0, 9))
    newer = _sent(senders[0], 0, version=2)
    senders[0].retire(1)
    senders[0].retire(1)
    _check_fetched(dict(receiver.fetch(newer)), _weights(0, 2))
    _check_gone(receiver, again)
    for sender in senders:
        sender.close()
    receiver.close()


# --- clauses ----------------------------------------------------------------------------------------------------------
def _check_output(function: LossFunction, inputs: LossBatch) -> None:
    output, _ = _differentiate(function, inputs)
    assert output.loss.shape == (), f"the loss must be one number, shape [], and has shape {list(output.loss.shape)}"
    for name, value in output.metrics.items():
        assert isinstance(value, Tensor), f"metric {name!r} must be a tensor and is a {type(value).__name__}"
        assert value.shape == (), f"metric {name!r} must be one number, shape [], and has shape {list(value.shape)}"
        assert not value.requires_grad, f"metric {name!r} carries a gradient; detach it"


def _check_zero_weights(function: LossFunction, inputs: LossBatch) -> None:
    """Whatever the values of a token outside the stream, it must not be trained."""
    outside = inputs.weights == 0
    apart = attrs.evolve(inputs, engine_logprobs=torch.where(outside, -60.0, inputs.engine_logprobs))
    for batch in (inputs, apart):
        _, gradient = _differentiate(function, batch)
        reached = gradient[outside]
        assert (reached == 0).all(), (
            f"{int((reached != 0).sum())} of {len(reached)} tokens of weight 0 have a gradient "
            f"(up to {reached.abs().max():.3g}); replace them before computing: torch.where(weights != 0, x, 0.0)"
        )


def _check_sum(function: LossFunction, inputs: LossBatch) -> None:
    whole, gradient = _differentiate(function, inputs)
    middle = inputs.sample_count // 2
    halves = [
        _differentiate(function, _samples(inputs, lambda ids: ids < middle, first=0, count=middle)),
        _differentiate(
            function,
            _samples(inputs, lambda ids: ids >= middle, first=middle, count=inputs.sample_count - middle),
        ),
    ]
    reason = "a loss is a SUM over tokens, never a mean: core divides by the global token count"
    _assert_close(sum(h.loss for h, _ in halves), whole.loss, f"the losses of two halves do not add up; {reason}")
    _assert_close(torch.cat([g for _, g in halves]), gradient, f"a token's gradient depends on its batch; {reason}")
    for name, value in whole.metrics.items():
        parts = sum(h.metrics[name] for h, _ in halves)
        _assert_close(parts, value, f"metric {name!r} of two halves does not add up; metrics are sums too")


def _check_packing(function: LossFunction, inputs: LossBatch) -> None:
    """Samples in another order are the same batch."""
    order = torch.argsort(inputs.sample_count - 1 - inputs.sample_ids, stable=True)
    shuffled = _take(inputs, order)
    shuffled = attrs.evolve(shuffled, sample_ids=inputs.sample_count - 1 - shuffled.sample_ids)
    (whole, gradient), (other, other_gradient) = _differentiate(function, inputs), _differentiate(function, shuffled)
    _assert_close(other.loss, whole.loss, "the loss depends on the order in which samples are packed")
    _assert_close(other_gradient, gradient[order], "the gradient depends on the order in which samples are packed")


def _check_weights(function: LossFunction, inputs: LossBatch) -> None:
    (once, _), (twice, _) = (
        _differentiate(function, attrs.evolve(inputs, weights=factor * inputs.weights)) for factor in (1.0, 2.0)
    )
    _assert_close(twice.loss, 2 * once.loss, "weights must multiply the per-token loss, but twice the weights do not")


def _check_extremes(function: LossFunction, inputs: LossBatch) -> None:
    rare, certain = torch.full_like(inputs.weights, -80.0), torch.full_like(inputs.weights, -1e-6)
    for trainer, engine, label in ((certain, rare, "e^80"), (rare, certain, "e^-80")):
        for sign in (1.0, -1.0):
            extreme = attrs.evolve(
                inputs, trainer_logprobs=trainer, engine_logprobs=engine, advantages=sign * inputs.advantages.abs()
            )
            output, gradient = _differentiate(function, extreme)
            finite = bool(torch.isfinite(output.loss)) and bool(torch.isfinite(gradient).all())
            direction = "positive" if sign > 0 else "negative"
            assert finite, f"loss or gradient is not finite where the ratio is {label} and advantages are {direction}"


def _check_on_policy_gradient(function: LossFunction, inputs: LossBatch) -> None:
    agreeing = attrs.evolve(
        inputs, engine_logprobs=inputs.trainer_logprobs, staleness=torch.zeros_like(inputs.staleness)
    )
    _, gradient = _differentiate(function, agreeing)
    expected = -inputs.weights * inputs.advantages
    _assert_close(gradient, expected, "where trainer and engine agree, the gradient must be -weight x advantage")


def _check_fetched(fetched: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert fetched.keys() == expected.keys(), f"fetched {sorted(fetched)} where {sorted(expected)} were sent"
    for name, tensor in expected.items():
        seen = fetched[name]
        assert (seen.dtype, seen.shape) == (tensor.dtype, tensor.shape), (
            f"tensor {name} came as {seen.dtype} {list(seen.shape)}, and was {tensor.dtype} {list(tensor.shape)}"
        )
        assert torch.equal(seen.cpu(), tensor), f"tensor {name} is not what was sent"


def _check_parts_of(receiver: WeightReceiver, manifest: Manifest, expected: dict[str, Tensor]) -> None:
    """Whoever asks for less gets that: of both parts, of one of them, nothing."""
    for ending in ("view", "0.half", "nothing"):
        chosen = {name: tensor for name, tensor in expected.items() if name.endswith(ending)}
        _check_fetched(dict(receiver.fetch(manifest.only(chosen.__contains__))), chosen)


def _check_gone(receiver: WeightReceiver, manifest: Manifest) -> None:
    try:
        dict(receiver.fetch(manifest))
    except InfrastructureError:
        return
    raise AssertionError(f"version {manifest.version} was retired, and can be fetched still")


# --- tools ------------------------------------------------------------------------------------------------------------
def _differentiate(function: LossFunction, inputs: LossBatch) -> tuple[LossOutput, Tensor]:
    """The output, and the gradient [N] of its loss."""
    logprobs = inputs.trainer_logprobs.detach().clone().requires_grad_()
    output = function(attrs.evolve(inputs, trainer_logprobs=logprobs))
    assert isinstance(output, LossOutput), f"a loss returns prl.providers.LossOutput, not {type(output).__name__}"
    assert output.loss.requires_grad, "the loss carries no gradient: it must be computed from trainer_logprobs"
    (gradient,) = torch.autograd.grad(output.loss.sum(), logprobs)
    return output, gradient


def _samples(inputs: LossBatch, chosen: Callable[[Tensor], Tensor], *, first: int, count: int) -> LossBatch:
    """Some whole samples as a batch of their own, numbered from 0."""
    part = _take(inputs, torch.nonzero(chosen(inputs.sample_ids)).squeeze(1))
    return attrs.evolve(part, sample_ids=part.sample_ids - first, sample_count=count)


def _take(inputs: LossBatch, index: Tensor) -> LossBatch:
    columns = {f.name: getattr(inputs, f.name) for f in attrs.fields(LossBatch)}
    taken: dict[str, Any] = {name: column[index] for name, column in columns.items() if isinstance(column, Tensor)}
    return attrs.evolve(inputs, **taken)


def _assert_close(seen: Tensor | int, expected: Tensor, broken: str) -> None:
    difference = (torch.as_tensor(seen) - expected).abs().max().item()
    scale = expected.abs().max().item()
    assert difference <= 1e-5 * max(scale, 1.0), f"{broken} (difference {difference:.3g}, values up to {scale:.3g})"


def _weights(rank: int, seed: int) -> dict[str, Tensor]:
    """Of a rank: of several types, without elements, without dimensions, and not in one piece."""
    draw = torch.Generator().manual_seed(10 * seed + rank)
    return {
        f"rank{rank}.matrix": torch.randn(5, 3, generator=draw),
        f"rank{rank}.view": torch.randn(4, 6, generator=draw)[:, ::2],
        f"rank{rank}.half": torch.randn(7, generator=draw).to(torch.bfloat16),
        f"rank{rank}.bytes": torch.randint(0, 255, (3,), generator=draw, dtype=torch.uint8),
        f"rank{rank}.empty": torch.empty(0, 4),
        f"rank{rank}.number": torch.randn((), generator=draw),
    }


def _sent(sender: WeightSender, rank: int, *, version: int) -> Manifest:
    """A part of a version, changed by the trainer as soon as it is sent."""
    tensors = {name: tensor.clone() for name, tensor in _weights(rank, version).items()}
    manifest = sender.send(version, tensors.items())
    for tensor in tensors.values():
        tensor.zero_()
    return manifest
