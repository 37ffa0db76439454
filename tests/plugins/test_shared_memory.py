"""Weights through memory that processes of one host share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cattrs
import pytest
import torch
from prl.errors import InfrastructureError
from prl_shared_memory import SharedMemoryConfig
from prl_shared_memory.segments import KEPT, receive, send

CONFIG = SharedMemoryConfig()


@pytest.fixture
def sender(tmp_path):
    sender = send(CONFIG, tmp_path)
    yield sender
    sender.close()


def weights(version: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(version)
    return {"a": torch.randn(5, 3, generator=draw), "b": torch.randn(7, generator=draw).to(torch.bfloat16)}


def fetched(tmp_path, manifest):
    return dict(receive(CONFIG, tmp_path).fetch(manifest))


def test_an_engine_fetches_what_the_trainer_sent(sender, tmp_path):
    seen = fetched(tmp_path, sender.send(3, weights(3).items()))
    assert seen.keys() == weights(3).keys()
    assert all(torch.equal(seen[name], tensor) for name, tensor in weights(3).items())
    assert seen["b"].dtype == torch.bfloat16


def test_another_process_fetches_it_too(sender, tmp_path):
    manifest = sender.send(3, weights(3).items())
    program = f"""
import cattrs, pathlib
from prl.types import Manifest
from prl_shared_memory import SharedMemoryConfig
from prl_shared_memory.segments import receive
manifest = cattrs.structure({cattrs.unstructure(manifest)!r}, Manifest)
for name, tensor in receive(SharedMemoryConfig(), pathlib.Path({str(tmp_path)!r})).fetch(manifest):
    print(name, float(tensor.double().sum()))
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    expected = [f"{name} {float(tensor.double().sum())}" for name, tensor in weights(3).items()]
    assert output.splitlines() == expected


def test_tensors_stay_valid_after_their_version_is_retired(sender, tmp_path):
    seen = fetched(tmp_path, sender.send(1, weights(1).items()))
    sender.retire(1)
    sender.retire(1)
    assert torch.equal(seen["a"], weights(1)["a"])


def test_only_the_newest_versions_take_memory(sender, tmp_path):
    manifests = [sender.send(version, weights(version).items()) for version in range(8, 8 + KEPT + 1)]
    assert sorted(Path(m.location).name for m in manifests if Path(m.location).exists()) == [
        "version-10",
        "version-11",
        "version-9",
    ]
    with pytest.raises(InfrastructureError, match=r"weights of version 8: .* is gone"):
        fetched(tmp_path, manifests[0])
    assert torch.equal(fetched(tmp_path, manifests[-1])["a"], weights(11)["a"])


def test_a_flipped_byte_is_refused(sender, tmp_path):
    manifest = sender.send(4, weights(4).items())
    path = Path(manifest.location)
    content = bytearray(path.read_bytes())
    content[manifest.tensors[1].offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(InfrastructureError, match="weights of version 4: tensor b has checksum"):
        fetched(tmp_path, manifest)


def test_a_truncated_segment_is_refused(sender, tmp_path):
    manifest = sender.send(4, weights(4).items())
    path = Path(manifest.location)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InfrastructureError, match="weights of version 4: tensor b ends at byte"):
        fetched(tmp_path, manifest)


def test_the_folder_is_private_and_goes_with_the_sender(tmp_path):
    sender = send(CONFIG, tmp_path)
    folder = Path(sender.send(1, weights(1).items()).location).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    sender.close()
    assert not folder.exists()


def test_what_an_earlier_attempt_left_is_cleared(tmp_path):
    left = Path(send(CONFIG, tmp_path).send(1, weights(1).items()).location)
    sender = send(CONFIG, tmp_path)
    assert not left.exists()
    sender.close()


def test_runs_do_not_share_a_folder(tmp_path):
    one, other = send(CONFIG, tmp_path / "one"), send(CONFIG, tmp_path / "other")
    assert one.folder != other.folder
    one.close()
    other.close()


def test_a_folder_of_someone_else_is_refused(tmp_path, monkeypatch):
    folder = send(CONFIG, tmp_path).folder
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors: None)  # as if it could not be removed
    with pytest.raises(InfrastructureError, match="belongs to someone else"):
        send(CONFIG, tmp_path)
    folder.rmdir()
