"""The wandb tracker against the real package, offline: what it writes is read back from wandb's own file."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from prl_wandb import WandbConfig
from prl_wandb.tracker import WandbTracker, build
from wandb.proto import wandb_internal_pb2

BLOCK = 32 * 1024
RECORD_HEADER = 7  # crc 4, length 2, type 1
FULL, LAST = 1, 4


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    folder = tmp_path / "spell-1"
    folder.mkdir()
    (folder / "run.toml").write_text('[run]\nsteps = 3\n\n[model]\ntype = "qwen3"\n')
    return folder


def start(run_dir: Path, **config: str) -> WandbTracker:
    tracker = build(WandbConfig(mode="offline", project="words", **config), run=None, run_dir=run_dir)  # type: ignore[arg-type]
    tracker.start()
    return tracker


def finish(tracker: WandbTracker, error: BaseException | None = None) -> None:
    """End the run, and wandb's service, which writes the last records in its own time."""
    tracker.finish(error)
    wandb.teardown()


def fragments(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, payload) of every fragment of a LevelDB log, which is what a .wandb file is after 7 bytes of its own."""
    position = RECORD_HEADER
    while position + RECORD_HEADER <= len(content):
        length, kind = struct.unpack_from("<HB", content, position + 4)
        if kind:
            yield kind, content[position + RECORD_HEADER : position + RECORD_HEADER + length]
        position += RECORD_HEADER + length
        if BLOCK - position % BLOCK < RECORD_HEADER:
            position += BLOCK - position % BLOCK


def records(run_dir: Path) -> Iterator[wandb_internal_pb2.Record]:
    """Every record of the run's single offline file."""
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    payload = b""
    for kind, fragment in fragments(path.read_bytes()):
        payload += fragment
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(payload)
            yield record
            payload = b""


def history(run_dir: Path) -> list[dict[str, object]]:
    rows = (r.history.item for r in records(run_dir) if r.WhichOneof("record_type") == "history")
    return [{i.key or i.nested_key[0]: json.loads(i.value_json) for i in items} for items in rows]


def test_metrics_can_be_read_back_from_an_offline_run(run_dir: Path) -> None:
    tracker = start(run_dir)
    tracker.log(1, {"reward/mean": 0.25, "loss/rl": -0.5})
    tracker.log(2, {"reward/mean": 0.5})
    finish(tracker)
    rows = history(run_dir)
    assert [(row["step"], row["reward/mean"]) for row in rows] == [(1, 0.25), (2, 0.5)]
    assert rows[0]["loss/rl"] == -0.5


def test_an_evaluation_that_arrives_after_later_steps_is_kept(run_dir: Path) -> None:
    tracker = start(run_dir)
    tracker.log(5, {"reward/mean": 0.5})
    tracker.log(3, {"eval/words/accuracy": 0.75, "eval/version": 3})
    finish(tracker)
    rows = history(run_dir)
    assert rows[1]["eval/words/accuracy"] == 0.75
    assert rows[1]["eval/version"] == 3


def test_the_run_is_named_after_its_directory_and_carries_its_config(run_dir: Path) -> None:
    tracker = start(run_dir)
    finish(tracker, RuntimeError("engine gone"))
    (run,) = (r.run for r in records(run_dir) if r.WhichOneof("record_type") == "run")
    (exit_record,) = (r.exit for r in records(run_dir) if r.WhichOneof("record_type") == "exit")
    assert (run.display_name, run.project) == ("spell-1", "words")
    config = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert config["model"] == {"type": "qwen3"}
    assert exit_record.exit_code == 1
