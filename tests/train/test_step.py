"""One optimizer step against a formula written out by hand, and everything that must not change its gradient."""

from __future__ import annotations

import math

import attrs
import numpy as np
import pytest
import torch
from prl.blocks.context import Context
from prl.blocks.decoder import Decoder
from prl.errors import RunError
from prl.train.rows import rows_of
from prl.train.streams import StreamLoss
from prl.types import Batch, MicroBatch

from tests.train.tiny import (
    MODELS,
    GradientRecorder,
    build_losses,
    build_model,
    build_stepper,
    gradients_of,
    pack_batch,
    random_samples,
    relative_difference,
    siblings,
)


def full_logprobs(model, micro: MicroBatch) -> torch.Tensor:
    """[T] log-probability of every token under its own temperature, with all logits at once; 0 for first tokens."""
    hidden = model.hidden(torch.tensor(micro.tokens).long(), Context.packed(torch.tensor(micro.cu_seqlens)))
    logits = (hidden @ model.head().T)[:-1] / torch.tensor(micro.temperatures)[1:, None]
    rest = logits.log_softmax(-1).gather(1, torch.tensor(micro.tokens).long()[1:, None]).squeeze(1)
    return torch.cat([torch.zeros(1), rest])


def loss_by_hand(model, batch: Batch) -> torch.Tensor:
    """The three default losses summed token by token, each over its own number of tokens in the batch."""
    (micro,) = batch.ranks[0]
    trainer = full_logprobs(model, micro)
    total = torch.zeros(())
    for t in range(len(micro.tokens)):
        log_ratio = trainer[t] - float(micro.engine_logprobs[t])
        ratio, moved = log_ratio.exp(), (trainer[t].exp() - math.exp(micro.engine_logprobs[t])).item()
        advantage = float(micro.advantages[t])
        masked = moved > 0.2 if advantage > 0 else moved < -0.2
        excess = (trainer[t] - float(micro.ref_logprobs[t])).detach()
        per_token = {
            "rl": 1e-3 * log_ratio**2 - (0.0 if masked else advantage * ratio),
            "ce": -trainer[t],
            "ref_kl": 1e-3 * log_ratio**2 + (0.0 if moved < -0.2 else excess * ratio),
        }
        for stream, weights in micro.weights.items():
            if weights[t] != 0:
                total = total + float(weights[t]) * per_token[stream] / batch.token_counts[stream]
    return total


def test_the_streams_add_up_each_over_its_own_count():
    batch = pack_batch(random_samples(9))
    assert min(batch.token_counts.values()) > 3
    model = build_model()
    loss_by_hand(model, batch).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert relative_difference(gradients_of(batch), expected) < 1e-5


def test_the_reported_sums_are_the_losses_before_division():
    batch = pack_batch(random_samples(9))
    model = build_model()
    report = build_stepper(model, GradientRecorder(model.named_parameters())).step(batch, batch.ranks[0], 0.0)
    total = sum(report.sums[f"loss/{stream}"] / count for stream, count in batch.token_counts.items())
    assert total == pytest.approx(loss_by_hand(model, batch).item(), rel=1e-5)


@pytest.mark.parametrize(
    "changed",
    [
        {"micro_batch_tokens": 12},
        {"micro_batch_tokens": 30},
        {"reverse": True},
        {"logprob_chunk": 1},
        {"logprob_chunk": 1000},
    ],
    ids=str,
)
@pytest.mark.parametrize("model_name", MODELS)
def test_packing_order_split_and_chunk_do_not_change_the_gradient(model_name, changed):
    changed = dict(changed)
    samples = random_samples(12)
    chunk = changed.pop("logprob_chunk", 7)
    other = samples[::-1] if changed.pop("reverse", False) else samples
    repacked = gradients_of(pack_batch(other, **changed), model_name=model_name, logprob_chunk=chunk)
    assert relative_difference(repacked, gradients_of(pack_batch(samples), model_name=model_name)) < 1e-5


def test_a_micro_batch_without_tokens_changes_nothing():
    batch = pack_batch(random_samples(6))
    _, (empty,) = pack_batch(random_samples(1), ranks=2).ranks
    padded = attrs.evolve(batch, ranks=((*batch.ranks[0], empty),))
    assert len(empty.tokens) == 0
    assert relative_difference(gradients_of(padded), gradients_of(batch)) == 0.0


def test_mismatch_is_measured_over_sampled_tokens_and_apart_for_fresh_samples():
    samples = random_samples(6)
    samples[0] = attrs.evolve(samples[0], versions=np.where(samples[0].sampled, 5, -1).astype(np.int32))
    batch = pack_batch(samples)
    (micro,) = batch.ranks[0]
    model = build_model()
    report = build_stepper(model, GradientRecorder(model.named_parameters())).step(batch, batch.ranks[0], 0.0)
    d = full_logprobs(model, micro).detach().double().numpy() - micro.engine_logprobs
    k3 = np.exp(d) - d - 1
    spans = [slice(a, b) for a, b in zip(micro.cu_seqlens[:-1], micro.cu_seqlens[1:], strict=True)]
    fresh = np.concatenate([micro.sampled[s] & (micro.versions[s][micro.sampled[s]] == 5).all() for s in spans])
    assert 0 < fresh.sum() < micro.sampled.sum()
    assert report.sums["mismatch/count"] == micro.sampled.sum()
    assert report.sums["mismatch/k3"] == pytest.approx(k3[micro.sampled].sum(), rel=1e-5)
    assert report.sums["mismatch_fresh/count"] == fresh.sum()
    assert report.sums["mismatch_fresh/k3"] == pytest.approx(k3[fresh].sum(), rel=1e-5)


def test_a_tiny_mismatch_does_not_cancel():
    sample = random_samples(1)[0]
    model = build_model()
    (micro,) = pack_batch([sample]).ranks[0]
    logprobs = full_logprobs(model, micro).detach().numpy()
    shifted = attrs.evolve(sample, engine_logprobs=np.where(sample.sampled, logprobs - 1e-4, 0).astype(np.float32))
    batch = pack_batch([shifted])
    report = build_stepper(model, GradientRecorder(model.named_parameters())).step(batch, batch.ranks[0], 0.0)
    assert report.sums["mismatch/k3"] / report.sums["mismatch/count"] == pytest.approx(0.5e-8, rel=0.05)


def test_entropy_is_summed_over_rl_tokens_only():
    batch = pack_batch(random_samples(6))
    (micro,) = batch.ranks[0]
    model = build_model()
    report = build_stepper(model, GradientRecorder(model.named_parameters())).step(batch, batch.ranks[0], 0.0)
    hidden = model.hidden(torch.tensor(micro.tokens).long(), Context.packed(torch.tensor(micro.cu_seqlens)))
    scores = ((hidden @ model.head().T)[:-1] / torch.tensor(micro.temperatures)[1:, None]).log_softmax(-1)
    entropy = -(scores.exp() * scores).sum(-1)[micro.weights["rl"][1:] != 0]
    assert report.sums["entropy/count"] == len(entropy) == batch.token_counts["rl"]
    assert report.sums["entropy"] == pytest.approx(entropy.sum().item(), rel=1e-5)


def test_supervised_batches_report_no_entropy_and_no_mismatch():
    demonstration = random_samples(2)[1]
    sample = attrs.evolve(demonstration, sampled=np.zeros(len(demonstration), dtype=np.bool_), ref_logprobs=None)
    batch = pack_batch([sample])
    assert batch.token_counts.keys() == {"ce"}
    model = build_model()
    report = build_stepper(model, GradientRecorder(model.named_parameters())).step(batch, batch.ranks[0], 0.0)
    assert report.sums.keys() == {"loss/ce"}


def test_the_gradient_is_clipped_to_the_global_norm():
    batch = pack_batch(random_samples(6))
    whole = gradients_of(batch)
    norm = math.sqrt(sum(g.square().sum().item() for g in whole.values()))
    model = build_model()
    recorder = GradientRecorder(model.named_parameters())
    report = build_stepper(model, recorder, max_grad_norm=norm / 4).step(batch, batch.ranks[0], 0.0)
    assert report.values["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert relative_difference({k: 4 * g for k, g in recorder.gradients.items()}, whole) < 1e-5


def test_the_learning_rate_of_the_order_is_the_one_used():
    batch = pack_batch(random_samples(6))
    model = build_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)
    report = build_stepper(model, optimizer).step(batch, batch.ranks[0], 0.5)
    moved = {name: (before[name] - p.detach()) / 0.5 for name, p in model.named_parameters()}
    assert relative_difference(moved, gradients_of(batch)) < 1e-4
    assert report.values["learning_rate"] == 0.5
    assert all(p.grad is None for p in model.parameters())


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone():
    sample = random_samples(1)[0]
    broken = attrs.evolve(sample, advantages=np.where(sample.sampled, np.nan, 0).astype(np.float32))
    batch = pack_batch([broken])
    model = build_model()
    stepper = build_stepper(model, torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(RunError, match="gradient of step 6 has norm nan"):
        stepper.step(batch, batch.ranks[0], 1.0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), build_model().parameters(), strict=True))


def test_a_stream_without_a_loss_is_refused():
    batch = pack_batch(random_samples(6))
    model = build_model()
    only_rl = {"rl": build_losses()["rl"]}
    stepper = build_stepper(model, GradientRecorder(model.named_parameters()), losses=only_rl)
    with pytest.raises(RunError, match=r"step 6 has tokens of the ce stream, and losses\.ce is not set"):
        stepper.step(batch, batch.ranks[0], 0.0)


def test_a_loss_that_asks_for_entropy_is_given_it():
    seen = {}

    def spy(inputs):
        seen["entropy"] = inputs.entropy
        return build_losses()["ce"].function(inputs)

    batch = pack_batch([attrs.evolve(random_samples(2)[1], ref_logprobs=None)])
    losses = {"ce": StreamLoss(function=spy, needs=frozenset({"entropy"}))}
    gradients_of(batch, losses=losses)
    assert seen["entropy"].shape == (len(np.flatnonzero(batch.ranks[0][0].sampled)),)
    assert not seen["entropy"].requires_grad


@pytest.mark.parametrize("model_name", ["qwen3", "qwen3_moe"])
def test_a_prompt_that_is_computed_once_has_the_gradient_of_one_that_is_computed_for_every_sibling(
    model_name, monkeypatch
):
    batch = pack_batch([sibling for seed in range(3) for sibling in siblings(seed)])
    shared = gradients_of(batch, model_name=model_name)
    assert rows_of(batch.ranks[0][0], share=True).source is not None
    monkeypatch.setattr(Decoder, "shares_prefixes", False)
    assert relative_difference(shared, gradients_of(batch, model_name=model_name)) < 1e-5
