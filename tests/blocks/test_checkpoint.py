from __future__ import annotations

import json
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from prl.blocks import checkpoint, tensor_folder
from prl.blocks.form import Form
from prl.blocks.weight_map import ListedWeightMap, Rows, Tied
from prl.errors import CheckpointError
from safetensors import safe_open
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


class Counting:
    """A number format that notes how many of the tensors it made were alive at one time."""

    serve_dtype = torch.float32

    def __init__(self) -> None:
        self.alive: list[weakref.ref[Tensor]] = []
        self.most = 0

    def export(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        for part in ("first", "second"):
            made = tensor * 2
            if not made.is_meta:
                self.alive.append(weakref.ref(made))
                self.most = max(self.most, sum(ref() is not None for ref in self.alive))
            yield f"{name}.{part}", made

    def declaration(self, kept: object) -> None:
        return None


def test_at_most_one_tensor_is_encoded_at_a_time_while_saving(tmp_path: Path) -> None:
    counting: Any = Counting()
    model = Pair()
    checkpoint.save(model.state_dict().items(), WEIGHT_MAP, tmp_path, form=Form(number_format=counting))
    stored = load_file(tmp_path / "model.safetensors")
    assert len(stored) == len(counting.alive) == 8
    assert counting.most <= 2  # the one being written and the one that is made next
    assert torch.equal(stored["m.norm.second"], model.norm.detach() * 2)


def test_a_file_lays_wide_elements_first_whatever_comes_first(tmp_path: Path) -> None:
    """Aligned without gaps, so that readers map it into memory."""
    tensors = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.rand(3), "c": torch.rand(5).bfloat16()}
    tensor_folder.write(tmp_path, list(tensors.items()), tensors.items(), max_shard_bytes=10**6)
    read = load_file(tmp_path / "model.safetensors")
    assert {name: t.dtype for name, t in read.items()} == {name: t.dtype for name, t in tensors.items()}
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    content = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["b"]["data_offsets"] == [0, 12]
    assert header["__metadata__"] == {"format": "pt"}
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["a", "b", "c"]


def test_what_comes_must_be_what_was_announced(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a was announced as torch\.float32 \[2\], but b came as"):
        tensor_folder.write(tmp_path, [("a", torch.zeros(2))], [("b", torch.zeros(2))], max_shard_bytes=10**6)
    assert not list(tmp_path.glob("*.safetensors"))


def test_an_index_that_leaves_the_folder(tmp_path: Path) -> None:
    save(tmp_path, max_shard_bytes=50)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of-00003.safetensors", "../elsewhere.safetensors"))
    with pytest.raises(CheckpointError, match=r"is in '\.\./elsewhere\.safetensors', which is no name of a file"):
        checkpoint.load(Pair(), WEIGHT_MAP, tmp_path)


def test_a_config_that_is_none(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config\.json holds list, where a config is an object"):
        checkpoint.load(Pair(), WEIGHT_MAP, tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        checkpoint.load(Pair(), WEIGHT_MAP, tmp_path)


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
