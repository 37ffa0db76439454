from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prl.blocks.weight_map import ExpertStack, ListedWeightMap, Rows, Tied
from torch import Tensor

FUSED = Rows("qkv.weight", (("q.weight", 4), ("k.weight", 2), ("v.weight", 2)))
STACKED = ExpertStack("experts.up", 3, (("experts.{}.gate.weight", 2), ("experts.{}.up.weight", 2)))
TIED = Tied("embed.weight", copies=("head.weight",))


def weight_map() -> ListedWeightMap:
    return ListedWeightMap(
        operations=[FUSED, STACKED, TIED], prefixes={"": "model.", "head.": "head."}, config={"model_type": "test"}
    )


def module_tensors(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "embed.weight": (5, 3),
        "layers.0.qkv.weight": (8, 3),
        "layers.0.experts.up": (3, 4, 3),
        "layers.0.norm.weight": (3,),
    }
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def exported(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {hf: view for name, tensor in tensors.items() for hf, view in weight_map().to_hf(name, tensor)}


def test_names_and_values() -> None:
    tensors = module_tensors()
    stored = exported(tensors)
    assert sorted(stored) == sorted(
        ["model.embed.weight", "model.layers.0.norm.weight"]
        + [f"model.layers.0.{part}.weight" for part in "qkv"]
        + [f"model.layers.0.experts.{e}.{part}.weight" for e in range(3) for part in ("gate", "up")]
    )
    assert torch.equal(stored["model.layers.0.k.weight"], tensors["layers.0.qkv.weight"][4:6])
    assert torch.equal(stored["model.layers.0.experts.2.up.weight"], tensors["layers.0.experts.up"][2, 2:])


def test_export_copies_nothing() -> None:
    tensors = module_tensors()
    stored = exported(tensors)
    start = tensors["layers.0.qkv.weight"].data_ptr()
    assert stored["model.layers.0.q.weight"].data_ptr() == start
    assert stored["model.layers.0.k.weight"].data_ptr() == start + 4 * 3 * 4


@given(st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_round_trip_is_exact(seed: int) -> None:
    tensors = module_tensors(seed)
    stored = exported(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(weight_map().from_hf(stored, name), tensor)


def test_a_missing_tensor_is_named() -> None:
    stored = exported(module_tensors())
    del stored["model.layers.0.k.weight"]
    with pytest.raises(KeyError, match=r"model\.layers\.0\.k\.weight"):
        weight_map().from_hf(stored, "layers.0.qkv.weight")


def test_a_tied_copy_must_be_equal() -> None:
    stored = exported(module_tensors())
    stored["head.weight"] = stored["model.embed.weight"].clone()
    assert torch.equal(weight_map().from_hf(stored, "embed.weight"), stored["model.embed.weight"])
    stored["head.weight"][0, 0] += 1
    with pytest.raises(ValueError, match=r"head\.weight differs from embed\.weight"):
        weight_map().from_hf(stored, "embed.weight")


def test_the_longest_prefix_counts() -> None:
    ((name, _),) = weight_map().to_hf("head.weight", torch.zeros(1))
    assert name == "head.weight"


def test_config_is_passed_on() -> None:
    assert weight_map().hf_config() == {"model_type": "test"}
