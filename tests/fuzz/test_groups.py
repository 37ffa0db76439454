"""Answers that are well-formed and wrong: what passes verification can be scored, packed, told and written down."""

from __future__ import annotations

import json
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from prl.compose.routing import Routing
from prl.dispatch.metrics import token_metrics
from prl.dispatch.record import rollout_lines
from prl.dispatch.verify import verify_group, verify_samples
from prl.errors import InfrastructureError
from prl.score.credit import score
from prl.score.pack import pack
from prl.types import ColumnReference, Failure, Group, Sample, StopReason, TaskRef, Turn
from prl_group_relative import GrpoConfig
from prl_group_relative.grpo import build

from tests.dispatch.fakes import answer, demonstration
from tests.fuzz.hostile import REQUEST, fuzzed, nested

NEWEST = 4
GRPO = build(GrpoConfig())
GOOD = answer(REQUEST)
LENGTH = len(GOOD.rollouts[0].tokens)

lengths = st.sampled_from([0, 1, LENGTH - 1, LENGTH, LENGTH + 1])
shapes = lengths | st.tuples(lengths, st.integers(1, 2))
small = st.integers(-3, 9)
floats = st.floats(width=32) | st.sampled_from([0.0, -1.0, float("nan"), float("inf")])
references = st.builds(
    ColumnReference,
    file=st.sampled_from(["3.1.0", "3.0.0", "4.1.0", "../token", ""]),
    dtype=st.just("uint8"),
    shape=st.lists(small, max_size=3).map(tuple),
    offset=small,
    checksum=small,
)
ROLLOUT: dict[str, st.SearchStrategy[Any]] = {
    "rollout_id": st.sampled_from(["3.0", "3.1", "3.4", "4.0", "", "3"]),
    "tokens": arrays.arrays(np.int32, shapes, elements=small),
    "sampled": arrays.arrays(np.bool_, shapes),
    "logprobs": arrays.arrays(np.float32, shapes, elements=floats),
    "versions": arrays.arrays(np.int32, shapes, elements=small),
    "temperature": floats,
    "turns": st.lists(st.builds(Turn, start=small, end=small, stop=st.just(StopReason.STOP)), max_size=3).map(tuple),
    "messages": st.lists(st.dictionaries(st.text(max_size=5), nested, max_size=3), max_size=3).map(tuple),
    "reward": floats,
    "metrics": st.dictionaries(st.sampled_from(["accuracy", "x"]), floats),
    "large": st.dictionaries(
        st.sampled_from(["routes", "route_versions"]), st.lists(references, max_size=2).map(tuple)
    ),
}
GROUP: dict[str, st.SearchStrategy[Any]] = {
    "group_id": small,
    "task": st.just(TaskRef(environment="toy", split="eval", index=5)),
    "attempt": small,
    "started_version": small,
    "rollouts": st.lists(st.sampled_from(GOOD.rollouts), max_size=6).map(tuple),
    "failures": st.lists(
        st.builds(Failure, rollout_id=ROLLOUT["rollout_id"], where=st.text(max_size=5), error=st.text(max_size=5)),
        max_size=3,
    ).map(tuple),
}
SAMPLE: dict[str, st.SearchStrategy[Any]] = {
    "tokens": ROLLOUT["tokens"],
    "sampled": ROLLOUT["sampled"],
    "engine_logprobs": ROLLOUT["logprobs"],
    "versions": ROLLOUT["versions"],
    "advantages": ROLLOUT["logprobs"],
    "weights": st.dictionaries(st.sampled_from(["rl", "ce", "ref_kl"]), ROLLOUT["logprobs"]),
    "ref_logprobs": ROLLOUT["logprobs"],
}


@st.composite
def changed(draw: Any, good: Any, fields: dict[str, st.SearchStrategy[Any]], most: int = 3) -> Any:
    """`good` with some of its fields replaced."""
    names = draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=most, unique=True))
    return attrs.evolve(good, **{name: draw(fields[name]) for name in names})


@st.composite
def groups(draw: Any) -> Group:
    group: Group = draw(changed(GOOD, GROUP) | st.just(GOOD))
    if not group.rollouts:
        return group
    member = draw(st.integers(0, len(group.rollouts) - 1))
    rollouts = list(group.rollouts)
    rollouts[member] = draw(changed(rollouts[member], ROLLOUT))
    return attrs.evolve(group, rollouts=tuple(rollouts))


def _train(samples: list[Sample], phase: Any) -> None:
    batch = pack(samples, step=NEWEST + 1, version=NEWEST, phase=phase, ranks=2, micro_batch_tokens=8)
    assert sum(int(micro.cu_seqlens[-1]) for rank in batch.ranks for micro in rank) == sum(map(len, samples))
    metrics = token_metrics(batch)
    assert metrics.get("staleness/max", 0) <= NEWEST


@fuzzed
@given(group=groups())
def test_a_group_that_is_believed_can_be_used(group):
    try:
        verify_group(group, REQUEST, NEWEST)
    except InfrastructureError:
        return
    if not group.rollouts:  # of which placement says that nothing came of it
        return
    scored = score(group, GRPO)
    _train(list(scored.samples), "rl")
    lines = [json.dumps(line) for line in rollout_lines(1, [scored])]
    assert len(lines) == len(group.rollouts)
    assert all(rollout.oldest_version <= NEWEST for rollout in group.rollouts)


@fuzzed
@given(sample=changed(demonstration(2), SAMPLE))
def test_a_demonstration_that_is_believed_can_be_trained_on(sample):
    try:
        verify_samples([demonstration(1), sample])
    except InfrastructureError:
        return
    _train([demonstration(1), sample], "warmup")


def _rollout(**changes: Any) -> Group:
    return attrs.evolve(GOOD, rollouts=(attrs.evolve(GOOD.rollouts[0], **changes), *GOOD.rollouts[1:]))


def _column(values: Any, dtype: Any) -> Any:
    return np.asarray(values, dtype=dtype)


def _deep(levels: int) -> Any:
    return [_deep(levels - 1)] if levels else 0


OTHER = TaskRef(environment="toy", split="train", index=6)
REFERENCE = ColumnReference(file="3.1.0", dtype="uint8", shape=(LENGTH, 3, 2), offset=0, checksum=0)
VERSIONS = attrs.evolve(REFERENCE, dtype="int32", shape=(LENGTH,))
ROUTING = Routing(layers=("layers.1", "layers.2", "layers.4"), experts=8, experts_per_token=2)


def _routed(*pieces: ColumnReference, versions: ColumnReference = VERSIONS) -> Group:
    return _rollout(large={"routes": pieces, "route_versions": (versions,)})


@pytest.mark.parametrize(
    ("group", "sentence"),
    [
        (attrs.evolve(GOOD, group_id=4), "group 3 .* was asked for, the answer is group 4"),
        (attrs.evolve(GOOD, task=OTHER), "was asked for"),
        (attrs.evolve(GOOD, rollouts=GOOD.rollouts[:1] * 2), "not members of 4"),
        (_rollout(rollout_id="3.4"), "not members of 4"),
        (_rollout(tokens=_column([1, 2], np.int32)), "columns of shapes"),
        (_rollout(tokens=_column([1, 2, 3, 4, -1], np.int32)), "negative token"),
        (_rollout(sampled=_column([True] * LENGTH, np.bool_)), "begins with a sampled token"),
        (_rollout(versions=_column([-1, -1, 2, 2, 5], np.int32)), "versions from -1 to 5; the newest is 4"),
        (_rollout(logprobs=_column([0, 0, -1, -1, np.nan], np.float32)), "log-probability that is not finite"),
        (_rollout(reward=float("nan")), "reward or metric that is not finite"),
        (_rollout(temperature=0.7), "temperature 0.7, not 0.5"),
        (_rollout(turns=(Turn(start=2, end=9, stop=StopReason.STOP),)), "turn outside its 5 tokens"),
        (_rollout(messages=({"role": "user", "content": b"bytes"},)), "no JSON"),
        (_rollout(messages=({"role": "user", "content": _deep(40)},)), "no JSON"),
        (_routed(attrs.evolve(REFERENCE, file="3.0.0")), "not its own"),
        (_routed(attrs.evolve(REFERENCE, shape=(4, 3, 2))), "not its own"),
        (_routed(attrs.evolve(REFERENCE, shape=())), "not its own"),
        (_routed(), "not its own"),
        (_routed(REFERENCE, REFERENCE), "not its own"),
        (_routed(attrs.evolve(REFERENCE, shape=(LENGTH, 4, 2))), "unlike the model's routes"),
        (_routed(attrs.evolve(REFERENCE, dtype="uint16")), "unlike the model's routes"),
        (_routed(REFERENCE, versions=attrs.evolve(VERSIONS, dtype="uint8")), "unlike the model's routes"),
        (_rollout(large={"routes": (REFERENCE,)}), "unlike the model's routes"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_reason(group, sentence):
    with pytest.raises(InfrastructureError, match=sentence):
        verify_group(group, REQUEST, NEWEST, ROUTING)


def test_what_was_asked_for_is_believed():
    verify_group(GOOD, REQUEST, NEWEST)
    verify_group(
        _routed(attrs.evolve(REFERENCE, shape=(1, 3, 2)), attrs.evolve(REFERENCE, shape=(LENGTH - 1, 3, 2))),
        REQUEST,
        NEWEST,
        ROUTING,
    )
    with pytest.raises(InfrastructureError, match="unlike the model's routes"):
        verify_group(_routed(REFERENCE), REQUEST, NEWEST)
    verify_samples([demonstration(index) for index in range(4)])
