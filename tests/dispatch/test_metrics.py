"""Metrics from batches, groups and reports."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
from prl.dispatch.metrics import accuracy, group_metrics, token_metrics, trainer_idle, trainer_metrics
from prl.messages import StepDone
from prl.score.credit import Scored
from prl.score.pack import pack
from prl.types import Batch, Group, Sample, StopReason, TaskRef, Turn

from tests.dispatch.fakes import demonstration, rollout


def report(sums: dict[str, float], **seconds: float) -> StepDone:
    return StepDone(step=1, version=1, sums=sums, values={"grad_norm": 2.0}, seconds=seconds)


def batch(*versions: int, version: int = 5) -> Batch:
    """One sample of three sampled tokens per version."""
    samples = []
    for number, sampled_by in enumerate(versions):
        source = rollout(f"0.{number}", version=sampled_by)
        samples.append(
            Sample(
                tokens=source.tokens,
                sampled=source.sampled,
                engine_logprobs=source.logprobs,
                versions=source.versions,
                advantages=np.zeros(5, dtype=np.float32),
                temperature=1.0,
                weights={"rl": source.sampled.astype(np.float32)},
            )
        )
    return pack(samples, step=version + 1, version=version, phase="rl", ranks=2, micro_batch_tokens=10)


def scored(environment: str, *rewards: float) -> Scored:
    rollouts = tuple(rollout(f"0.{i}", reward=r, sampled=i + 1) for i, r in enumerate(rewards))
    task = TaskRef(environment=environment, split="train", index=0)
    group = Group(group_id=0, task=task, attempt=0, started_version=0, rollouts=rollouts)
    return Scored(group=group, samples=(), advantages=())


def test_throughput_is_per_device_while_the_slowest_rank_computes():
    reports = [
        report({"throughput/tokens": 600.0, "throughput/flops": 8e9}, forward_backward=1.5, optimizer=0.5, wait=9.0),
        report({"throughput/tokens": 200.0, "throughput/flops": 4e9}, forward_backward=0.5, optimizer=0.5),
    ]
    metrics = trainer_metrics(batch(5), reports)
    assert next(iter(metrics)) == "tokens/per_second_per_device"
    assert metrics["tokens/per_second_per_device"] == 800 / 2 / 2
    assert metrics["flops/per_second_per_device"] == 12e9 / 2 / 2
    assert metrics.keys().isdisjoint({"mfu", "throughput/tokens", "throughput/flops"})
    known = attrs.evolve(reports[0], values={"throughput/peak": 1e10})
    metrics = trainer_metrics(batch(5), [known, reports[1]])
    assert metrics["mfu"] == 0.3
    assert "throughput/peak" not in metrics


def test_the_most_memory_of_any_rank_is_shown():
    reports = [attrs.evolve(report({}), peaks={"memory/peak": most}) for most in (3.0, 5.0)]
    metrics = trainer_metrics(batch(5), reports)
    assert metrics["memory/peak"] == 5.0
    assert "tokens/per_second_per_device" not in metrics


def test_sums_of_all_ranks_are_divided_by_the_global_counts():
    reports = [
        report({"loss/rl": 6.0, "loss/rl/kept": 9.0, "mismatch/k3": 1.0, "mismatch/count": 4.0, "entropy": 3.0}),
        report({"loss/rl": 3.0, "mismatch/k3": 2.0, "mismatch/count": 8.0, "entropy/count": 6.0}),
    ]
    metrics = trainer_metrics(batch(5, 4, 3), reports)
    assert metrics["loss/rl"] == 9.0 / 9
    assert metrics["loss/rl/kept"] == 9.0 / 9
    assert metrics["mismatch/k3"] == 3.0 / 12
    assert metrics["entropy"] == 0.5
    assert metrics["grad_norm"] == 2.0
    assert "mismatch/k3_fresh" not in metrics


def test_fresh_mismatch_has_a_count_of_its_own():
    reports = [report({"mismatch_fresh/k3": 1.0, "mismatch_fresh/count": 2.0})] * 2
    assert trainer_metrics(batch(5), reports)["mismatch/k3_fresh"] == 0.5


def test_times_are_those_of_the_slowest_rank():
    metrics = trainer_metrics(batch(5), [report({}, wait=1.0, publish=0.25), report({}, wait=3.0)])
    assert (metrics["time/wait"], metrics["time/export"]) == (3.0, 0.25)
    assert "time/publish" not in metrics


def test_staleness_is_counted_over_sampled_tokens():
    metrics = token_metrics(batch(5, 5, 4, 2))
    assert (metrics["tokens/trained"], metrics["tokens/sampled"]) == (20, 12)
    assert (metrics["staleness/0"], metrics["staleness/1"], metrics["staleness/3"]) == (0.5, 0.25, 0.25)
    assert (metrics["staleness/mean"], metrics["staleness/max"]) == (1.0, 3)
    assert "staleness/2" not in metrics


def test_a_batch_in_which_nothing_was_sampled_has_no_staleness():
    samples = [demonstration(1), demonstration(2)]
    supervised = pack(samples, step=1, version=0, phase="warmup", ranks=1, micro_batch_tokens=100)
    assert token_metrics(supervised) == {"tokens/trained": 9, "tokens/sampled": 0}


def test_rewards_are_means_of_groups():
    metrics = group_metrics([scored("a", 0.0, 1.0), scored("a", 1.0), scored("b", 0.0, 0.0, 0.0)])
    assert (metrics["reward/a"], metrics["reward/b"]) == (0.75, 0.0)
    assert metrics["reward/mean"] == 0.5
    assert metrics["accuracy/mean"] == pytest.approx(2 / 6)
    assert metrics["length/mean"] == pytest.approx((1 + 2 + 1 + 1 + 2 + 3) / 6)


def test_truncated_rollouts_are_a_share():
    group = scored("a", 0.0, 1.0)
    cut = attrs.evolve(group.group.rollouts[0], turns=(Turn(start=2, end=3, stop=StopReason.LENGTH),))
    half = attrs.evolve(group, group=attrs.evolve(group.group, rollouts=(cut, group.group.rollouts[1])))
    assert group_metrics([half])["length/truncated"] == 0.5


def test_without_groups_there_are_no_rewards():
    assert group_metrics([]) == {}


def test_accuracy_is_that_of_the_rollouts_that_have_one():
    with_accuracy, without = rollout("0.0", reward=1.0), attrs.evolve(rollout("0.1"), metrics={})
    assert accuracy([with_accuracy, without], "x") == {"x": 1.0}
    assert accuracy([without], "x") == {}


def test_idle_is_a_share_of_the_step():
    reports = [report({}, wait=1.0), report({}, wait=3.0)]
    assert trainer_idle(reports, 4.0) == 0.5
    assert trainer_idle(reports, 1.0) == 1.0
    assert trainer_idle(reports, 0.0) == 0.0
