"""Every family on every kind of mesh, two and four ranks on gloo, against one rank: gradients, their norm, sums."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from prl.train.agent import launch

from tests.train.parallel.mesh_program import FAMILIES, MESHES, name

REPOSITORY = Path(__file__).parents[3]
CASES = [
    pytest.param(world, family, name(layout, way), id=f"{family} {name(layout, way)}")
    for world, meshes in MESHES.items()
    for family in FAMILIES
    for layout, way in meshes
    if family != "qwen3" or layout.expert == 1
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """World size -> what its ranks left behind; they run once for all tests of this file."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        for world in MESHES:
            folders[world] = folder = tmp_path_factory.mktemp(f"ranks-{world}")
            program = [sys.executable, "-m", "tests.train.parallel.mesh_program", str(folder)]
            assert launch(program, ranks=world) == 0
    return folders


@pytest.mark.parametrize(("world", "family", "mesh"), CASES)
def test_a_mesh_computes_what_one_rank_computes(found, world, family, mesh):
    ranks = [json.loads((found[world] / f"{family} {mesh} {rank}.json").read_text()) for rank in range(world)]
    assert max(rank["difference"] for rank in ranks) < 1e-5
    for rank in ranks:
        seen, expected = rank["grad_norm"]
        assert seen == pytest.approx(expected, rel=1e-5)
    sums: dict[str, float] = defaultdict(float)
    for rank in ranks:
        for key, value in rank["sums"].items():
            sums[key] += value
    assert sums == pytest.approx(ranks[0]["expected"], rel=1e-4)


def test_ranks_hold_their_share_and_no_more(found):
    """Of a model divided over all ranks, experts over two of them."""
    ranks = [json.loads((found[2] / f"qwen3_moe shard2 expert2 full {rank}.json").read_text()) for rank in range(2)]
    whole = ranks[0]["parameters"]
    assert sum(rank["held"] for rank in ranks) == whole
    assert max(rank["held"] for rank in ranks) < 0.52 * whole
