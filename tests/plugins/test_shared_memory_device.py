"""Versions that wait on the trainer's GPU: all but the calls of CUDA, over files that stand for device memory."""

from __future__ import annotations

import ast
import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import attrs
import cattrs
import pytest
import torch
from prl.compose.compose import compose
from prl.errors import ConfigError, InfrastructureError, UserError
from prl.testing import check_weight_transport
from prl.types import Manifest
from prl_shared_memory import SharedMemoryConfig, cuda
from prl_shared_memory.cuda import HANDLE, Segment
from prl_shared_memory.device import KEPT, DeviceSender
from prl_shared_memory.segments import SharedMemoryReceiver, receive, send
from torch import Tensor

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs anonymous files")

CONFIG = Path(__file__).parents[2] / "configs" / "spell_backward.toml"
GPU = SharedMemoryConfig(memory="device")


@attrs.define
class Files:
    """Device memory, of any process: a handle is the name of a file."""

    folder: Path
    opened: dict[int, mmap.mmap] = attrs.field(factory=dict)

    def allocate(self, nbytes: int) -> Segment:
        path = self.folder / f"{os.getpid()}-{len(list(self.folder.iterdir()))}"
        path.write_bytes(bytes(nbytes))
        with path.open("r+b") as file:
            content = torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8)
        return Segment(path.name.encode().ljust(HANDLE, b"\0"), content)

    def open(self, handle: bytes) -> int:
        try:
            with (self.folder / handle.rstrip(b"\0").decode()).open("r+b") as file:
                mapped = mmap.mmap(file.fileno(), 0)
        except OSError as error:
            raise InfrastructureError(f"invalid device pointer: {error}") from error
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        self.opened[address] = mapped
        return address

    def close(self, address: int) -> None:
        del self.opened[address]

    def copy(self, address: int, nbytes: int) -> Tensor:
        return torch.frombuffer(bytearray(ctypes.string_at(address, nbytes)) or bytearray(1), dtype=torch.uint8)[
            :nbytes
        ]

    def stream(self) -> Any:
        return nullcontext()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def sender(files: Files) -> Iterator[DeviceSender]:
    sender = DeviceSender(files)
    yield sender
    sender.close()


@pytest.fixture
def receiver(files: Files, monkeypatch: pytest.MonkeyPatch) -> SharedMemoryReceiver:
    monkeypatch.setattr(cuda, "problem", lambda: "")
    return SharedMemoryReceiver(files.folder, files)


def weights(version: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(version)
    large = {f"large.{i}": torch.randn(300_000, generator=draw) for i in range(3)}
    return {"a": torch.randn(5, 3, generator=draw), "b": torch.randn(7, generator=draw).to(torch.bfloat16), **large}


def test_the_contract_of_transports_holds(files: Files, receiver: SharedMemoryReceiver) -> None:
    check_weight_transport(lambda rank: DeviceSender(files), receiver)
    assert not files.opened


def test_versions_are_written_over_the_memory_of_older_ones(
    files: Files, sender: DeviceSender, receiver: SharedMemoryReceiver
) -> None:
    manifests = []
    for version in range(6):
        manifests.append(sender.send(version, weights(version).items()))
        seen = dict(receiver.fetch(manifests[-1]))
        assert all(torch.equal(seen[name], tensor) for name, tensor in weights(version).items())
        if version == KEPT - 1:
            segments = len(list(files.folder.iterdir()))
    assert len(list(files.folder.iterdir())) == segments > KEPT
    assert all(torch.equal(t, weights(4)[name]) for name, t in receiver.fetch(manifests[4]))
    with pytest.raises(InfrastructureError, match=r"weights of version 3: .* is gone"):
        dict(receiver.fetch(manifests[3]))
    assert not files.opened


def test_tensors_of_other_sizes_find_room(sender: DeviceSender, receiver: SharedMemoryReceiver) -> None:
    sender.send(0, {"a": torch.ones(10)}.items())
    for version in range(1, 2 * KEPT + 1):
        tensors = {"a": torch.full((400_000 * version,), 2.0), "none": torch.empty(0, 3), "b": torch.arange(9)}
        seen = dict(receiver.fetch(sender.send(version, tensors.items())))
        assert all(torch.equal(seen[name], tensor) for name, tensor in tensors.items())


def test_who_reads_what_is_written_over_is_refused(
    files: Files, sender: DeviceSender, receiver: SharedMemoryReceiver
) -> None:
    coming = receiver.fetch(sender.send(1, weights(1).items()))
    name, first = next(coming)
    for version in range(2, 2 + KEPT):
        sender.send(version, weights(version).items())
    with pytest.raises(InfrastructureError, match=r"weights of version 1: tensor large.* has checksum"):
        list(coming)
    assert torch.equal(first, weights(1)[name])
    assert not files.opened


def test_a_flipped_byte_is_refused(files: Files, sender: DeviceSender, receiver: SharedMemoryReceiver) -> None:
    manifest = sender.send(1, weights(1).items())
    first = min(files.folder.iterdir(), key=lambda path: path.name)
    with first.open("r+b") as file:
        file.seek(manifest.tensors[1].offset)
        byte = file.read(1)[0]
        file.seek(manifest.tensors[1].offset)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(InfrastructureError, match="weights of version 1: tensor b has checksum"):
        dict(receiver.fetch(manifest))
    assert not files.opened


@pytest.mark.parametrize("content", [b"", b'[{"handle": "zz", "nbytes": 4}]', b'[{"nbytes": 4}]', b"[1]"])
def test_a_damaged_list_is_refused(sender: DeviceSender, receiver: SharedMemoryReceiver, content: bytes) -> None:
    manifest = sender.send(1, weights(1).items())
    with Path(manifest.parts[0].location).open("r+b") as file:
        file.truncate(0)
        file.write(content)
    with pytest.raises(InfrastructureError, match=r"weights of version 1: the list of segments in .* cannot be read"):
        dict(receiver.fetch(manifest))


def test_bytes_that_are_in_no_segment_are_refused(sender: DeviceSender, receiver: SharedMemoryReceiver) -> None:
    manifest = sender.send(1, weights(1).items())
    with Path(manifest.parts[0].location).open("r+b") as file:
        file.truncate(0)
        file.write(b"[]")
    with pytest.raises(InfrastructureError, match=r"weights of version 1: bytes 0 to .* are not in one of 0 segments"):
        dict(receiver.fetch(manifest))


def test_memory_that_cannot_be_opened_is_the_versions_failure(
    files: Files, sender: DeviceSender, receiver: SharedMemoryReceiver
) -> None:
    manifest = sender.send(1, weights(1).items())
    for path in files.folder.iterdir():
        path.unlink()
    with pytest.raises(InfrastructureError, match=r"weights of version 1 did not come from .*: invalid device pointer"):
        dict(receiver.fetch(manifest))


def test_a_trainer_that_was_killed_is_gone(files: Files, receiver: SharedMemoryReceiver) -> None:
    program = f"""
import os, pathlib, signal, sys
import cattrs, torch
from prl_shared_memory.device import DeviceSender
from tests.plugins.test_shared_memory_device import Files, weights
sender = DeviceSender(Files(pathlib.Path({str(files.folder)!r})))
print(cattrs.unstructure(sender.send(1, weights(1).items())), flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        manifest = cattrs.structure(ast.literal_eval(trainer.stdout.readline()), Manifest)
        seen = dict(receiver.fetch(manifest))
        coming = receiver.fetch(manifest)
        name, _ = next(coming)
        trainer.kill()
        trainer.wait()
        rest = {name for name, _ in coming}  # what was opened stays until it is closed
    assert all(torch.equal(seen[name], tensor) for name, tensor in weights(1).items())
    assert {name, *rest} == weights(1).keys()
    with pytest.raises(InfrastructureError, match=r"weights of version 1: .* is gone"):
        dict(receiver.fetch(manifest))
    assert not files.opened


# --- what is missing --------------------------------------------------------------------------------------------------
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_who_has_no_gpu_is_told(sender: DeviceSender, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a GPU here, and no CUDA device is visible"):
        send(GPU, tmp_path, 0)
    manifest = sender.send(1, weights(1).items())
    with pytest.raises(InfrastructureError, match="weights of version 1 wait on a GPU, and no CUDA device is visible"):
        dict(receive(GPU, tmp_path).fetch(manifest))


def test_a_trainer_on_cpus_keeps_nothing_on_a_gpu() -> None:
    edits = ['weights.type="shared_memory"', 'weights.memory="device"']
    with pytest.raises(ConfigError) as refused:
        compose(CONFIG, overrides=[*edits, 'trainer.device="cpu"'])
    assert 'weights.memory = "device" is memory of GPUs' in str(refused.value)
    assert compose(CONFIG, overrides=[*edits, 'trainer.device="auto"']).run.weights == GPU
