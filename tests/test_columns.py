"""Large columns: written, read, refused when they are not what was written, and carried from rollout to micro-batch."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
from prl import wire
from prl.columns import ColumnFolder, abandoned
from prl.errors import InfrastructureError
from prl.score.credit import score
from prl.score.pack import pack
from prl.types import Batch, ColumnReference, Group, TaskRef
from prl_group_relative import GrpoConfig
from prl_group_relative.grpo import build

from tests.dispatch.fakes import demonstration, rollout

LENGTH = 5
ROUTES = np.arange(LENGTH * 3 * 2, dtype=np.uint8).reshape(LENGTH, 3, 2)
SCORES = np.arange(LENGTH, dtype=np.float32)


def written(folder: ColumnFolder, member: int = 0, attempt: int = 1) -> dict[str, ColumnReference]:
    return folder.write({"routes": ROUTES, "scores": SCORES + member}, group_id=7, attempt=attempt)


def test_columns_are_read_as_they_were_written(tmp_path):
    folder = ColumnFolder(tmp_path / "columns")
    large = written(folder)
    routes, scores = folder.read(large["routes"]), folder.read(large["scores"])
    assert (routes.dtype, routes.tolist()) == (np.uint8, ROUTES.tolist())
    assert (scores.dtype, scores.tolist()) == (np.float32, SCORES.tolist())
    assert folder.files() == [large["routes"].file] == [large["scores"].file]
    assert large["routes"].file.startswith("7.1.")
    assert (tmp_path / "columns").stat().st_mode & 0o777 == 0o700


def test_empty_and_strided_columns_survive(tmp_path):
    folder = ColumnFolder(tmp_path)
    columns = {"empty": np.zeros((0, 4), dtype=np.int32), "strided": ROUTES[::2, :, 1]}
    large = folder.write(columns, group_id=0, attempt=0)
    assert folder.read(large["empty"]).shape == (0, 4)
    assert folder.read(large["strided"]).tolist() == ROUTES[::2, :, 1].tolist()


def test_a_column_stays_readable_when_its_file_is_replaced_or_removed(tmp_path):
    folder = ColumnFolder(tmp_path)
    reference = written(folder)["routes"]
    routes = folder.read(reference)
    written(folder)
    folder.remove(folder.files())
    folder.remove([reference.file])
    assert routes.tolist() == ROUTES.tolist()
    assert folder.files() == []


def test_a_type_that_no_wire_carries_is_not_written(tmp_path):
    with pytest.raises(TypeError, match="a large column of float64"):
        ColumnFolder(tmp_path).write({"x": np.zeros(2)}, group_id=0, attempt=0)
    assert ColumnFolder(tmp_path).files() == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"file": "7.1.9"}, "cannot be read"),
        ({"file": "../token"}, "contradicts itself"),
        ({"file": ""}, "contradicts itself|cannot be read"),
        ({"dtype": "object"}, "contradicts itself"),
        ({"shape": (-5, 6)}, "contradicts itself"),
        ({"offset": -64}, "contradicts itself"),
        ({"shape": (1 << 40, 1 << 40)}, "ends at byte"),
        ({"offset": 1 << 62}, "ends at byte"),
        ({"shape": (LENGTH, 5)}, "has checksum"),
        ({"checksum": 1}, "where 00000001 was written"),
    ],
)
def test_a_reference_that_lies_is_refused(tmp_path, change, sentence):
    folder = ColumnFolder(tmp_path)
    reference = attrs.evolve(written(folder)["routes"], **change)
    with pytest.raises(InfrastructureError, match=sentence):
        folder.read(reference)


def test_a_flipped_byte_is_refused(tmp_path):
    folder = ColumnFolder(tmp_path)
    large = written(folder)
    path = tmp_path / large["scores"].file
    content = bytearray(path.read_bytes())
    content[large["scores"].offset] ^= 1
    path.write_bytes(content)
    assert folder.read(large["routes"]).tolist() == ROUTES.tolist()
    with pytest.raises(InfrastructureError, match=r"column 7\.1\.\w+ has checksum"):
        folder.read(large["scores"])


def test_files_of_attempts_that_are_over_are_abandoned():
    files = ["7.1.0", "7.1.1", "7.0.0", "8.0.0", "-1.0.0", "7.1.2.99.partial", "8.0.1.99.partial"]
    assert abandoned(files, {(7, 1)}) == ["7.0.0", "8.0.0", "-1.0.0", "8.0.1.99.partial"]


def test_references_reach_the_micro_batch_of_their_sample(tmp_path):
    folder = ColumnFolder(tmp_path)
    large = [{name: (column,) for name, column in written(folder, i).items()} for i in range(3)]
    rollouts = [attrs.evolve(rollout(f"7.{i}", reward=float(i)), large=large[i]) for i in range(3)]
    group = Group(
        group_id=7,
        task=TaskRef(environment="toy", split="train", index=0),
        attempt=1,
        started_version=0,
        rollouts=(*rollouts, rollout("7.3")),
    )
    samples = [*score(group, build(GrpoConfig())).samples, demonstration(1)]
    batch = pack(samples, step=1, version=0, phase="rl", ranks=2, micro_batch_tokens=2 * LENGTH)
    frames = [bytes(frame) for frame in wire.encode(batch)]
    received: Batch = wire.decode(frames, [Batch])
    seen: set[str] = set()
    for micro in (micro for rank in received.ranks for micro in rank):
        references = micro.large.get("routes", ())
        assert len(references) in (0, len(micro.cu_seqlens) - 1)
        for reference in (reference for pieces in references for reference in pieces):
            assert folder.read(reference).tolist() == ROUTES.tolist()
            seen.add(reference.file)
    assert seen == set(folder.files())
    assert len(seen) == 3


def test_what_an_attempt_writes_twice_is_stored_once(tmp_path):
    folder = ColumnFolder(tmp_path)
    first = written(folder)
    (tmp_path / first["routes"].file).chmod(0o400)
    assert written(folder) == first
    assert len(folder.files()) == 1
    assert written(folder, member=1)["routes"].file != first["routes"].file
    assert {file.split(".")[1] for file in (written(folder, attempt=2)["routes"].file, *folder.files())} == {"1", "2"}
