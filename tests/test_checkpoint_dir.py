"""The files of a checkpoint: what is complete, what is removed, what is refused and how."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import cattrs
import pytest
from prl import checkpoint_dir
from prl.checkpoint_dir import FORMAT, CheckpointManifest, FileRecord, RecordedFile
from prl.errors import CheckpointError

IDENTITY = {"model.layers": 2, "model.names": ["a", "b"], "optimizer.type": "adamw"}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return write(tmp_path / "step-3")


def write(path: Path) -> Path:
    """A complete checkpoint of two files."""
    folder = checkpoint_dir.partial(path)
    (folder / "trainer").mkdir(parents=True)
    with RecordedFile(folder / "trainer" / "rank-0") as file:
        file.write(b"some ")
        file.write(memoryview(b"bytes"))
    files = {"trainer/rank-0": file.record, "state": checkpoint_dir.write_json(folder / "state", {"a": 1})}
    manifest = CheckpointManifest(format=checkpoint_dir.FORMAT, step=3, identity=IDENTITY, files=files)
    checkpoint_dir.commit(path, manifest)
    return path


def refusal(path: Path, *names: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint_dir.verify(path, checkpoint_dir.read_manifest(path), names)
    return str(caught.value)


def test_what_is_written_is_what_is_read(saved):
    manifest = checkpoint_dir.read_manifest(saved)
    assert (manifest.step, manifest.identity) == (3, IDENTITY)
    assert manifest.files["trainer/rank-0"] == FileRecord(nbytes=10, checksum=0x9F597F55)
    checkpoint_dir.verify(saved, manifest, manifest.files)
    checkpoint_dir.check_sizes(saved, manifest)
    assert not checkpoint_dir.partial(saved).exists()


def test_a_checkpoint_of_the_same_step_gives_way(saved):
    (saved / "left").touch()
    write(saved)
    assert not (saved / "left").exists()


def test_only_complete_checkpoints_are_found_in_the_order_of_their_steps(tmp_path):
    for name in ("step-10", "step-9", "step-11.partial", "step-x", "other"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoint_dir.complete(tmp_path)] == ["step-9", "step-10"]
    assert checkpoint_dir.complete(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [(2, 0, [5, 6]), (2, 2, [2, 4, 5, 6]), (1, 5, [5, 6]), (0, 0, [1, 2, 3, 4, 5, 6]), (9, 0, [1, 2, 3, 4, 5, 6])],
)
def test_pruning(tmp_path, keep_last, keep_every, left):
    for step in range(1, 7):
        (tmp_path / f"step-{step}").mkdir()
    checkpoint_dir.prune(tmp_path, keep_last=keep_last, keep_every=keep_every)
    assert [checkpoint_dir.step_of(path) for path in checkpoint_dir.complete(tmp_path)] == left


# --- refusals ---------------------------------------------------------------------------------------------------------
def test_a_flipped_byte_of_any_file(saved):
    for name in ("trainer/rank-0", "state"):
        path = saved / name
        content = path.read_bytes()
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        assert refusal(saved, name).startswith(f"{path} is damaged: its checksum is ")
        path.write_bytes(content)


def test_a_file_cut_short_and_a_missing_one_are_seen_without_reading_them(saved):
    manifest, path = checkpoint_dir.read_manifest(saved), saved / "trainer" / "rank-0"
    path.write_bytes(b"some")
    with pytest.raises(CheckpointError, match="rank-0 is damaged: it has 4 bytes where 10 were written; restore it"):
        checkpoint_dir.check_sizes(saved, manifest)
    path.unlink()
    with pytest.raises(CheckpointError, match="rank-0 is missing: the checkpoint had it when it was written"):
        checkpoint_dir.check_sizes(saved, manifest)


def test_a_file_that_was_never_there(saved):
    sentence = f"checkpoint {saved} has no trainer/rank-7: its manifest.json does not list it"
    assert refusal(saved, "trainer/rank-7") == sentence


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", f'{{"format": {FORMAT}}}', f'{{"format": {FORMAT}, "step": "x"}}']
)
def test_a_damaged_manifest(saved, content):
    (saved / "manifest.json").write_text(content)
    assert "manifest.json is damaged (" in refusal(saved)


def test_another_format_and_no_manifest(saved):
    manifest = checkpoint_dir.read_manifest(saved)
    content = cattrs.unstructure(attrs.evolve(manifest, format=99))
    (saved / "manifest.json").write_text(json.dumps(content))
    assert f"has format 99, this prl reads {checkpoint_dir.FORMAT}" in refusal(saved)
    (saved / "manifest.json").unlink()
    assert "is no complete checkpoint: it has no manifest.json; name a folder step-N" in refusal(saved)


def test_a_foreign_config_is_told_in_full(saved):
    manifest = checkpoint_dir.read_manifest(saved)
    checkpoint_dir.check_identity(saved, manifest, {**IDENTITY, "model.names": ("a", "b")})
    other = {"model.layers": 3, "model.names": ("a", "b"), "quantization.type": "bf16"}
    with pytest.raises(CheckpointError) as caught:
        checkpoint_dir.check_identity(saved, manifest, other)
    assert str(caught.value).splitlines() == [
        f"checkpoint {saved} belongs to another config:",
        "  model.layers: 2 there, 3 here",
        "  optimizer.type: 'adamw' there, absent here",
        "  quantization.type: absent there, 'bf16' here",
        "Give this config the same values, or start from a checkpoint that has them.",
    ]
