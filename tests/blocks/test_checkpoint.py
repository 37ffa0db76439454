from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from prl.blocks import checkpoint
from prl.blocks.weight_map import ListedWeightMap, Rows, Tied
from prl.errors import CheckpointError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Pair(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.fused = nn.Parameter(torch.randn(6, 4, generator=draw))
        self.norm = nn.Parameter(torch.randn(4, generator=draw))
        self.register_buffer("bias", torch.randn(3, generator=draw))


WEIGHT_MAP = ListedWeightMap(
    operations=[Rows("fused", (("a", 4), ("b", 2)))], prefixes={"": "m."}, config={"model_type": "pair"}
)


def save(folder: Path, seed: int = 0, max_shard_bytes: int = 10**9) -> Pair:
    model = Pair(seed)
    checkpoint.save(model.state_dict().items(), WEIGHT_MAP, folder, max_shard_bytes=max_shard_bytes)
    return model


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for (name, tensor), (_, other) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(tensor, other), name


def rewrite(file: Path, **changes: Tensor | None) -> None:
    """Replace, add or (None) remove tensors of a safetensors file."""
    tensors = {name: t for name, t in {**load_file(file), **changes}.items() if t is not None}
    save_file(tensors, file)


def test_one_file(tmp_path: Path) -> None:
    saved = save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(load_file(tmp_path / "model.safetensors")) == ["m.a", "m.b", "m.bias", "m.norm"]
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "pair", "dtype": "float32"}
    loaded = Pair(seed=1)
    checkpoint.load(loaded, WEIGHT_MAP, tmp_path)
    assert_equal(saved, loaded)


def test_shards_with_an_index(tmp_path: Path) -> None:
    saved = save(tmp_path, max_shard_bytes=50)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["metadata"] == {"total_size": 4 * (24 + 4 + 3)}
    assert index["weight_map"]["m.a"] == files[0]
    assert set(index["weight_map"].values()) == set(files)
    for file in files:
        assert set(load_file(tmp_path / file)) == {n for n, f in index["weight_map"].items() if f == file}
    loaded = Pair(seed=1)
    checkpoint.load(loaded, WEIGHT_MAP, tmp_path)
    assert_equal(saved, loaded)


def test_several_files_without_an_index(tmp_path: Path) -> None:
    saved = save(tmp_path, max_shard_bytes=50)
    (tmp_path / "model.safetensors.index.json").unlink()
    loaded = Pair(seed=1)
    checkpoint.load(loaded, WEIGHT_MAP, tmp_path)
    assert_equal(saved, loaded)


def test_loading_casts_to_the_model(tmp_path: Path) -> None:
    saved = save(tmp_path)
    loaded = Pair(seed=1).bfloat16()
    checkpoint.load(loaded, WEIGHT_MAP, tmp_path)
    assert_equal(saved.bfloat16(), loaded)


def test_at_most_one_tensor_is_held_while_loading(tmp_path: Path) -> None:
    """The weight map is asked for one tensor after the other, each after the one before it was copied."""
    save(tmp_path)
    model = Pair(seed=1)
    seen: list[tuple[str, bool]] = []

    class Watching:
        carried = ()

        def from_hf(self, tensors: Mapping[str, Any], name: str) -> Tensor:
            seen.append((name, torch.equal(model.fused, Pair(seed=0).fused)))
            return WEIGHT_MAP.from_hf(tensors, name)

        def to_hf(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
            return WEIGHT_MAP.to_hf(name, tensor)

        def hf_config(self) -> Mapping[str, Any]:
            return {}

    checkpoint.load(model, Watching(), tmp_path)
    assert seen == [("fused", False), ("norm", True), ("bias", True)]


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    save(tmp_path)
    rewrite(tmp_path / "model.safetensors", **{
        "m.a": torch.zeros(5, 4), "m.norm": torch.zeros(7), "m.bias": None, "m.extra": torch.zeros(1)
    })  # fmt: skip
    model = Pair(seed=1)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(model, WEIGHT_MAP, tmp_path)
    assert_equal(model, Pair(seed=1))
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "missing: m.bias" in message
    assert "m.a is [5, 4], the model's is [4, 4]" in message
    assert "m.norm is [7], the model's is [4]" in message
    assert "unexpected: m.extra" in message


def test_tensors_that_contradict_each_other(tmp_path: Path) -> None:
    weight_map = ListedWeightMap(operations=[Tied("norm", copies=("again",))], prefixes={"": ""}, config={})
    save_file({**Pair().state_dict(), "again": torch.zeros(4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="again differs from norm"):
        checkpoint.load(Pair(), weight_map, tmp_path)


def test_only_unexpected_tensors(tmp_path: Path) -> None:
    save(tmp_path)
    rewrite(tmp_path / "model.safetensors", **{"m.extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"not this model's; unexpected: m\.extra\. "):
        checkpoint.load(Pair(), WEIGHT_MAP, tmp_path)


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    save(tmp_path)
    rewrite(tmp_path / "model.safetensors", **{f"x{i}": torch.zeros(1) for i in range(20)})
    with pytest.raises(CheckpointError, match="and 12 more"):
        checkpoint.load(Pair(), WEIGHT_MAP, tmp_path)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        checkpoint.load(Pair(), WEIGHT_MAP, tmp_path)


def test_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(Pair(), WEIGHT_MAP, tmp_path)


def test_a_damaged_index(tmp_path: Path) -> None:
    save(tmp_path, max_shard_bytes=50)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not an index"):
        checkpoint.load(Pair(), WEIGHT_MAP, tmp_path)


def test_an_index_that_names_an_absent_file(tmp_path: Path) -> None:
    save(tmp_path, max_shard_bytes=50)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        checkpoint.load(Pair(), WEIGHT_MAP, tmp_path)


def test_an_index_that_names_an_absent_tensor(tmp_path: Path) -> None:
    save(tmp_path, max_shard_bytes=50)
    rewrite(tmp_path / "model-00002-of-00003.safetensors", **{"m.norm": None})
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is damaged: m\.norm"):
        checkpoint.load(Pair(), WEIGHT_MAP, tmp_path)


def test_two_checkpoints_do_not_mix_in_one_folder(tmp_path: Path) -> None:
    saved = save(tmp_path)
    with pytest.raises(CheckpointError, match="already holds weights"):
        save(tmp_path, seed=2)
    loaded = Pair(seed=1)
    checkpoint.load(loaded, WEIGHT_MAP, tmp_path)
    assert_equal(saved, loaded)
