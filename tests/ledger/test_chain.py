"""What a version's hash covers, and what it does not."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest
from prl.ledger.chain import batch_digest, link, manifest_digest
from prl.types import Batch, ColumnReference, TensorRecord, WeightPart

from tests.ledger.histories import Script, weights


def batch() -> Batch:
    script = Script()
    return script.form([script.group(), script.group()])


def changed(source: Batch, **columns: Any) -> Batch:
    ((micro_batch,),) = source.ranks
    return attrs.evolve(source, ranks=((attrs.evolve(micro_batch, **columns),),))


def test_equal_batches_have_equal_digests() -> None:
    assert batch_digest(batch()) == batch_digest(batch())


@pytest.mark.parametrize("column", ["tokens", "advantages", "engine_logprobs", "versions", "temperatures", "sampled"])
def test_one_number_of_one_column_changes_the_digest(column: str) -> None:
    source = batch()
    values = getattr(source.ranks[0][0], column).copy()
    values[3] = ~values[3] if values.dtype == np.bool_ else values[3] + 1
    assert batch_digest(changed(source, **{column: values})) != batch_digest(source)


def test_streams_steps_ranks_and_references_count() -> None:
    source = batch()
    (micro_batch,) = source.ranks[0]
    reference = ColumnReference(file="0.0.0", dtype="uint8", shape=(5, 2), offset=0, checksum=7)
    large = {"routes": ((reference,), ())}
    moved = {"routes": ((attrs.evolve(reference, file="elsewhere", offset=64),), ())}
    other = {"routes": ((attrs.evolve(reference, checksum=8),), ())}
    variants = [
        source,
        attrs.evolve(source, step=2),
        attrs.evolve(source, token_counts={"rl": 1}),
        attrs.evolve(source, ranks=((micro_batch, micro_batch),)),
        attrs.evolve(source, ranks=((micro_batch,), (micro_batch,))),
        changed(source, weights={"ce": micro_batch.weights["rl"]}),
        changed(source, large=large),
        changed(source, large=other),
    ]
    assert len({batch_digest(variant) for variant in variants}) == len(variants)
    assert batch_digest(changed(source, large=moved)) == batch_digest(variants[-2])


def test_weights_count_by_name_and_checksum_and_not_by_place() -> None:
    source = weights(3)
    first, second = source.tensors

    def sent(*parts: tuple[TensorRecord, ...]) -> str:
        located = (WeightPart(location=f"rank {rank}", tensors=part) for rank, part in enumerate(parts))
        return manifest_digest(attrs.evolve(source, parts=tuple(located)))

    expected = manifest_digest(source)
    assert sent((second, attrs.evolve(first, offset=640))) == expected
    assert sent((second,), (first,)) == expected
    assert sent((attrs.evolve(first, checksum=1), second)) != expected
    assert manifest_digest(None) == ""


def test_a_link_depends_on_all_it_covers() -> None:
    covered = [("a", "b", "c"), ("x", "b", "c"), ("a", "x", "c"), ("a", "b", "x"), ("a", "", "bc"), ("a", "bc", "")]
    assert len({link(*parts) for parts in covered}) == len(covered)
