"""Weights through memory that processes of one host share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cattrs
import pytest
import torch
from prl.errors import InfrastructureError
from prl.testing import check_weight_transport
from prl.types import Manifest
from prl_shared_memory import SharedMemoryConfig
from prl_shared_memory.segments import KEPT, FileSender, MemorySender, receive, send

CONFIG = SharedMemoryConfig()
RUN = Path("a run directory")


@pytest.fixture(params=["memory", "files"])
def sender(request, tmp_path, monkeypatch):
    """A sender of this system, and the one of systems without anonymous files."""
    if request.param == "files":
        monkeypatch.delattr(os, "memfd_create", raising=False)
        monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    sender = send(CONFIG, RUN, 0)
    assert isinstance(sender, FileSender if request.param == "files" else MemorySender)
    yield sender
    sender.close()


def weights(version: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(version)
    return {"a": torch.randn(5, 3, generator=draw), "b": torch.randn(7, generator=draw).to(torch.bfloat16)}


def fetched(manifest: Manifest) -> dict[str, torch.Tensor]:
    return dict(receive(CONFIG, RUN).fetch(manifest))


def overwrite(manifest: Manifest, content: bytes) -> None:
    with Path(manifest.parts[0].location).open("r+b") as file:
        file.truncate(len(content))
        file.write(content)


def test_the_contract_of_transports_holds(sender):
    check_weight_transport(lambda rank: send(CONFIG, RUN, rank), receive(CONFIG, RUN))


def test_an_engine_fetches_what_the_trainer_sent(sender):
    seen = fetched(sender.send(3, weights(3).items()))
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
for name, tensor in receive(SharedMemoryConfig(), pathlib.Path({str(RUN)!r})).fetch(manifest):
    print(name, float(tensor.double().sum()))
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    expected = [f"{name} {float(tensor.double().sum())}" for name, tensor in weights(3).items()]
    assert output.splitlines() == expected


def test_tensors_stay_valid_after_their_version_is_retired(sender):
    manifest = sender.send(1, weights(1).items())
    seen = fetched(manifest)
    sender.retire(1)
    sender.retire(1)
    assert torch.equal(seen["a"], weights(1)["a"])
    with pytest.raises(InfrastructureError, match=r"weights of version 1: .* is gone"):
        fetched(manifest)


def test_only_the_newest_versions_take_memory(sender):
    manifests = [sender.send(version, weights(version).items()) for version in range(8, 8 + KEPT + 1)]
    with pytest.raises(InfrastructureError, match=r"weights of version 8: .* is gone"):
        fetched(manifests[0])
    for manifest in manifests[1:]:
        assert torch.equal(fetched(manifest)["a"], weights(manifest.version)["a"])


def test_a_version_sent_again_replaces_the_one_before(sender):
    sender.send(1, weights(1).items())
    assert torch.equal(fetched(sender.send(1, weights(9).items()))["a"], weights(9)["a"])


def test_nothing_can_be_fetched_from_a_sender_that_closed(sender):
    manifest = sender.send(1, weights(1).items())
    sender.close()
    with pytest.raises(InfrastructureError, match=r"weights of version 1: .* is gone"):
        fetched(manifest)


def test_a_flipped_byte_is_refused(sender):
    manifest = sender.send(4, weights(4).items())
    content = bytearray(Path(manifest.parts[0].location).read_bytes())
    content[manifest.tensors[1].offset] ^= 1
    overwrite(manifest, content)
    with pytest.raises(InfrastructureError, match="weights of version 4: tensor b has checksum"):
        fetched(manifest)


def test_a_truncated_segment_is_refused(sender):
    manifest = sender.send(4, weights(4).items())
    overwrite(manifest, Path(manifest.parts[0].location).read_bytes()[:-1])
    with pytest.raises(InfrastructureError, match="weights of version 4: tensor b ends at byte"):
        fetched(manifest)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs anonymous files")
def test_a_descriptor_that_means_something_else_now_is_gone(tmp_path):
    with (tmp_path / "other").open("wb") as other:
        manifest = Manifest.single(version=1, location=f"/proc/{os.getpid()}/fd/{other.fileno()}", tensors=())
        with pytest.raises(InfrastructureError, match=r"weights of version 1: .* is gone"):
            fetched(manifest)


@pytest.mark.parametrize("location", ["/etc/hostname", "/proc/self/mem", "/proc/1/fd/../../self/mem", "\0"])
def test_nothing_is_read_that_no_sender_wrote(location):
    with pytest.raises(InfrastructureError, match=r"weights of version 1: .* (is not in|is no path)"):
        fetched(Manifest.single(version=1, location=location, tensors=()))


# --- files ------------------------------------------------------------------------------------------------------------
def test_the_folder_is_private_and_goes_with_the_sender(tmp_path):
    sender = FileSender(tmp_path / "weights")
    sender.send(1, weights(1).items())
    assert sender.folder.stat().st_mode & 0o777 == 0o700
    sender.close()
    assert not sender.folder.exists()


def test_what_an_earlier_attempt_left_is_cleared(tmp_path):
    manifest = FileSender(tmp_path / "weights").send(1, weights(1).items())
    FileSender(tmp_path / "weights")
    assert not Path(manifest.parts[0].location).exists()


def test_a_folder_of_someone_else_is_refused(tmp_path, monkeypatch):
    FileSender(tmp_path / "weights")
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors: None)  # as if it could not be removed
    with pytest.raises(InfrastructureError, match="belongs to someone else"):
        FileSender(tmp_path / "weights")
