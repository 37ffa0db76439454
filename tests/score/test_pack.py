"""Packing: every token once, no bin too full, the same work for every rank."""

from __future__ import annotations

import itertools

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prl.errors import RunError
from prl.score.pack import pack, round_up
from prl.types import Batch, MicroBatch, Sample


def sample(number: int, length: int, *, stream: str = "rl", reference: bool = False) -> Sample:
    """Tokens `number * 1000 + position`; every column is told apart by its value."""
    tokens = (1000 * number + np.arange(length)).astype(np.int32)
    floats = tokens.astype(np.float32)
    weights = np.where(np.arange(length) > 0, number % 3, 0).astype(np.float32)
    return Sample(
        tokens=tokens,
        sampled=tokens % 2 == 0,
        engine_logprobs=-floats,
        versions=tokens + 7,
        advantages=floats / 8,
        temperature=float(number),
        weights={stream: weights},
        ref_logprobs=-floats / 2 if reference else None,
    )


def packed(samples: list[Sample], *, ranks: int = 2, micro_batch_tokens: int = 20) -> Batch:
    return pack(samples, step=4, version=3, phase="rl", ranks=ranks, micro_batch_tokens=micro_batch_tokens)


def micro_batches(batch: Batch) -> list[MicroBatch]:
    return [micro for rank in batch.ranks for micro in rank]


lengths = st.lists(st.integers(1, 30), max_size=25)


@given(lengths=lengths, ranks=st.integers(1, 4), capacity=st.integers(5, 60))
def test_every_sample_is_packed_once_and_whole(lengths, ranks, capacity):
    samples = [sample(number, length) for number, length in enumerate(lengths)]
    seen = []
    for micro in micro_batches(packed(samples, ranks=ranks, micro_batch_tokens=capacity)):
        bounds = micro.cu_seqlens.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == len(micro.tokens)
        for start, end in itertools.pairwise(bounds):
            number = int(micro.tokens[start]) // 1000
            seen.append(number)
            whole = samples[number]
            assert micro.tokens[start:end].tolist() == whole.tokens.tolist()
            assert micro.sampled[start:end].tolist() == whole.sampled.tolist()
            assert micro.versions[start:end].tolist() == whole.versions.tolist()
            assert micro.advantages[start:end].tolist() == whole.advantages.tolist()
            assert micro.engine_logprobs[start:end].tolist() == whole.engine_logprobs.tolist()
            assert set(micro.temperatures[start:end]) == {whole.temperature}
            if "rl" in micro.weights:
                assert micro.weights["rl"][start:end].tolist() == whole.weights["rl"].tolist()
    assert sorted(seen) == list(range(len(samples)))


@given(lengths=lengths, ranks=st.integers(1, 4), capacity=st.integers(5, 60))
def test_ranks_get_equally_many_micro_batches_that_fit(lengths, ranks, capacity):
    samples = [sample(number, length) for number, length in enumerate(lengths)]
    batch = packed(samples, ranks=ranks, micro_batch_tokens=capacity)
    assert len({len(rank) for rank in batch.ranks}) == 1
    assert len(batch.ranks) == ranks
    for micro in micro_batches(batch):
        assert len(micro.tokens) <= capacity or len(micro.cu_seqlens) == 2


@given(lengths=lengths, ranks=st.integers(1, 4))
def test_empty_micro_batches_only_stand_in_where_nothing_can_be_split(lengths, ranks):
    samples = [sample(number, length) for number, length in enumerate(lengths)]
    counts = [len(micro.cu_seqlens) - 1 for micro in micro_batches(packed(samples, ranks=ranks))]
    if 0 in counts:
        assert max(counts) == 1


@given(lengths=lengths)
def test_token_counts_are_those_of_the_whole_batch(lengths):
    samples = [sample(n, length, stream=("rl", "ce")[n % 2]) for n, length in enumerate(lengths)]
    batch = packed(samples)
    for stream in ("rl", "ce"):
        expected = sum(int(np.count_nonzero(s.weights[stream])) for s in samples if stream in s.weights)
        assert batch.token_counts.get(stream, 0) == expected
        assert sum(int(np.count_nonzero(m.weights[stream])) for m in micro_batches(batch) if stream in m.weights) == (
            expected
        )


def test_a_batch_knows_its_step_and_phase():
    batch = packed([sample(1, 5)], ranks=1)
    assert (batch.step, batch.version, batch.phase) == (4, 3, "rl")


def test_a_single_bin_is_shared_out_among_the_ranks():
    batch = packed([sample(n, 5) for n in range(1, 5)], ranks=2)
    assert [[len(micro.tokens) for micro in rank] for rank in batch.ranks] == [[10], [10]]


def test_ranks_get_about_the_same_number_of_tokens():
    rng = np.random.default_rng(0)
    samples = [sample(n, int(length)) for n, length in enumerate(rng.integers(1, 60, size=200))]
    batch = packed(samples, ranks=4, micro_batch_tokens=100)
    loads = [sum(len(micro.tokens) for micro in rank) for rank in batch.ranks]
    assert max(loads) - min(loads) <= 60


# --- ranks that share sequences ---------------------------------------------------------------------------------------
@given(lengths=lengths, context=st.integers(2, 4), capacity=st.integers(5, 60))
def test_ranks_of_a_context_group_have_consecutive_shares(lengths, context, capacity):
    samples = [sample(number, length) for number, length in enumerate(lengths)]
    settings = {"step": 4, "version": 3, "phase": "rl", "micro_batch_tokens": capacity * context}
    whole = pack(samples, ranks=1, **settings).ranks[0]
    settings["micro_batch_tokens"] = capacity
    shared = pack(samples, ranks=context, context=context, **settings).ranks
    for number, micro in enumerate(whole):
        parts = [rank[number] for rank in shared]
        for field in ("tokens", "advantages", "versions", "sampled", "temperatures", "engine_logprobs"):
            own = np.concatenate([getattr(part, field)[part.own] for part in parts])
            assert own.tolist() == getattr(micro, field).tolist()
        for index, part in enumerate(parts):
            rows = part.shard.rows
            assert (part.shard.index, part.shard.count) == (index, context)
            assert part.cu_seqlens.tolist() == micro.cu_seqlens.tolist()
            assert part.tokens.tolist() == micro.tokens[index * rows : (index + 1) * rows + 1].tolist()
        assert rows * context >= len(micro.tokens)


@given(count=st.integers(1, 100_000))
def test_rounding_up_adds_little_and_leaves_few_lengths(count):
    rounded = round_up(count)
    assert count <= rounded <= count * 33 / 32
    assert round_up(rounded) == rounded


def test_a_sample_longer_than_a_micro_batch_has_one_to_itself():
    batch = packed([sample(1, 50), sample(2, 5), sample(3, 5)], ranks=1)
    assert sorted(len(micro.tokens) for micro in micro_batches(batch)) == [10, 50]


def test_streams_that_occur_anywhere_are_columns_everywhere():
    batch = packed([sample(1, 15, stream="rl"), sample(2, 15, stream="ce"), sample(3, 12, stream="ref_kl")], ranks=2)
    for micro in micro_batches(batch):
        assert set(micro.weights) == {"rl", "ce"}  # sample 3 has weight 0
        assert all(len(weights) == len(micro.tokens) for weights in micro.weights.values())


def test_reference_logprobs_are_zeros_where_a_sample_has_none():
    (micro,) = micro_batches(packed([sample(1, 2, reference=True), sample(2, 2)], ranks=1))
    assert micro.ref_logprobs.tolist() == [-500, -500.5, 0, 0]
    assert micro_batches(packed([sample(1, 2)], ranks=1))[0].ref_logprobs is None


def test_dtypes_are_those_of_the_glossary():
    batch = packed([sample(1, 4, reference=True)], ranks=2)
    for micro in micro_batches(batch):
        columns = [micro.tokens, micro.cu_seqlens, micro.versions]
        assert [column.dtype for column in columns] == [np.int32] * 3
        floats = [micro.temperatures, micro.advantages, micro.engine_logprobs, micro.ref_logprobs, micro.weights["rl"]]
        assert [column.dtype for column in floats] == [np.float32] * 5
        assert micro.sampled.dtype == np.bool_


def test_the_same_samples_give_the_same_batch():
    samples = [sample(n, 1 + n * 7 % 13) for n in range(30)]
    first, second = packed(samples), packed(list(samples))
    for left, right in zip(micro_batches(first), micro_batches(second), strict=True):
        assert left.tokens.tolist() == right.tokens.tolist()


def test_nothing_to_train_is_an_empty_batch():
    batch = packed([])
    assert batch.token_counts == {}
    assert [len(rank) for rank in batch.ranks] == [0, 0]


def test_a_weight_on_a_first_token_is_refused():
    wrong = attrs.evolve(sample(1, 4), weights={"rl": np.ones(4, dtype=np.float32)})
    with pytest.raises(RunError, match="sample 1: its first token has a weight, but no token precedes it"):
        packed([sample(1, 4), wrong])
