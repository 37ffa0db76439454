"""Groups in a file come back column by column."""

from __future__ import annotations

from pathlib import Path

import attrs
import numpy as np
import pytest
from prl.checkpoint_dir import FileRecord
from prl.dispatch import pending
from prl.errors import CheckpointError
from prl.types import Failure, Group, TaskRef

from tests.dispatch.fakes import rollout


def group(group_id: int, *, sampled: int) -> Group:
    return Group(
        group_id=group_id,
        task=TaskRef(environment="toy", split="train", index=7),
        attempt=2,
        started_version=3,
        rollouts=(rollout(f"{group_id}.0", version=3, sampled=sampled), rollout(f"{group_id}.1", version=4)),
        failures=(Failure(rollout_id=f"{group_id}.2", where="engine", error="gone"),),
    )


def test_groups_come_back_with_short_and_long_columns(tmp_path):
    groups = [group(1, sampled=3), group(5, sampled=5000)]
    record = pending.write(tmp_path / "groups", groups)
    assert record.nbytes == (tmp_path / "groups").stat().st_size
    for seen, expected in zip(pending.read(tmp_path / "groups"), groups, strict=True):
        assert (seen.group_id, seen.task, seen.attempt, seen.failures) == (
            expected.group_id,
            expected.task,
            expected.attempt,
            expected.failures,
        )
        for one, other in zip(seen.rollouts, expected.rollouts, strict=True):
            for field in attrs.fields(type(one)):
                np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_no_group_is_an_empty_file(tmp_path):
    assert pending.write(tmp_path / "groups", []) == FileRecord(nbytes=0, checksum=0)
    assert pending.read(tmp_path / "groups") == []


@pytest.mark.parametrize("content", [b"\x01", b"\xff" * 64, b"\x01" + b"\0" * 7 + b"\x03" + b"\0" * 7 + b"abc"])
def test_something_else_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "groups").write_bytes(content)
    with pytest.raises(CheckpointError, match="groups is no file of groups"):
        pending.read(tmp_path / "groups")
