"""Every family on every kind of mesh, two and four ranks on gloo, against one rank: gradients, their norm, sums."""

from __future__ import annotations

import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from prl.errors import CheckpointError
from prl.train.agent import launch
from prl.train.checkpoint import TrainerState
from prl.train.layout import Layout
from safetensors.torch import load_file

from tests.train.parallel.mesh_program import (
    FAMILIES,
    MESHES,
    REPLAYED,
    ROUTINGS,
    SAVED_ON,
    fits,
    largest_difference,
    name,
    whole_state,
)
from tests.train.tiny import build_qwen3

REPOSITORY = Path(__file__).parents[3]
CASES = [
    pytest.param(world, family, name(layout, way) + replay, id=f"{family} {name(layout, way)}{replay}")
    for world, meshes in MESHES.items()
    for family in FAMILIES
    for layout, way in meshes
    for replay in ("", REPLAYED)
    if fits(family, layout, bool(replay))
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What ranks left behind, two and then four; they run once for all tests of this file."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        for world in MESHES:
            program = [sys.executable, "-m", "tests.train.parallel.mesh_program", str(folder)]
            assert launch(program, ranks=world) == 0
    return folder


@pytest.mark.parametrize(("world", "family", "mesh"), CASES)
def test_a_mesh_computes_what_one_rank_computes(found, world, family, mesh):
    ranks = [json.loads((found / f"{family} {mesh} {rank}.json").read_text()) for rank in range(world)]
    assert max(rank["difference"] for rank in ranks) < 1e-5
    for rank in ranks:
        seen, expected = rank["grad_norm"]
        assert seen == pytest.approx(expected, rel=1e-5)
    sums: dict[str, float] = defaultdict(float)
    for rank in ranks:
        for key, value in rank["sums"].items():
            sums[key] += value
    assert sums == pytest.approx(ranks[0]["expected"], rel=1e-4)


@pytest.mark.parametrize("family", ROUTINGS)
def test_replayed_routes_are_others_than_the_routers_own(found, family):
    """Else the replay of a mesh would be compared with nothing new."""
    mesh = name(Layout(context=2), "selective")
    own, replayed = (json.loads((found / f"{family} {mesh}{way} 0.json").read_text()) for way in ("", REPLAYED))
    expected = replayed["expected"]
    assert expected["routes/replayed"] > 0.6 * expected["routes/count"]
    differ = [count for key, count in expected.items() if key.startswith("routes/differ/")]
    assert len(differ) == len(ROUTINGS[family].layers)
    assert min(differ) > 0.2 * expected["routes/replayed"]
    assert replayed["grad_norm"] != own["grad_norm"]


def test_ranks_hold_their_share_and_no_more(found):
    """Of a model divided over all ranks, experts over two of them."""
    ranks = [json.loads((found / f"qwen3_moe shard2 expert2 full {rank}.json").read_text()) for rank in range(2)]
    whole = ranks[0]["parameters"]
    assert sum(rank["held"] for rank in ranks) == whole
    assert max(rank["held"] for rank in ranks) < 0.52 * whole


LAYOUTS = [pytest.param(layout, id=name(layout, "")) for meshes in MESHES.values() for layout, _ in meshes]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_loads_on_every_mesh_and_training_goes_on(found, layout):
    for rank in range(layout.ranks):
        seen = json.loads((found / f"checkpoint {name(layout, 'none')} {rank}.json").read_text())
        assert seen["loaded"] == 0.0
        assert seen["continued"] < (1e-12 if layout == SAVED_ON else 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_process_loads_what_any_mesh_has_saved(found, layout):
    model = build_qwen3(seed=5, experts=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    state = TrainerState(model=model, optimizer=optimizer, rank=0, world_size=1, seed=5)
    assert state.load(found / f"again {name(layout, 'none')}") == 2
    assert largest_difference(whole_state(state), load_file(found / "saved.safetensors")) == 0.0


def test_every_byte_is_written_once(found):
    """Copies of the model, and what all ranks hold alike, do not fill the disk."""
    for layout in (SAVED_ON, Layout(replicate=2, shard=2, expert=2)):
        files = (found / f"again {name(layout, 'none')}" / "trainer").glob("*.safetensors")
        stored = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
        assert stored == sum(tensor.nbytes for tensor in load_file(found / "saved.safetensors").values())


@pytest.fixture
def copied(found, tmp_path):
    mesh = name(Layout(replicate=2, shard=2, expert=2), "none")
    return shutil.copytree(found / f"again {mesh}", tmp_path / "step-2")


def load_alone(checkpoint):
    model = build_qwen3(seed=5, experts=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    TrainerState(model=model, optimizer=optimizer, rank=0, world_size=1, seed=5).load(checkpoint)


def test_a_missing_part_is_refused(copied):
    (copied / "trainer" / "rank-3.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank-3\.safetensors is missing"):
        load_alone(copied)


@pytest.mark.parametrize("name", ["rank-1.safetensors", "rank-1.json"])
def test_a_flipped_byte_of_another_rank_s_part_is_refused(copied, name):
    part = copied / "trainer" / name
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank-1\.\w+ is damaged"):
        load_alone(copied)
