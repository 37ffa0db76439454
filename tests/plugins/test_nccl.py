"""Weights over process groups of two, here over gloo."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import attrs
import cattrs
import pytest
import torch
from prl.compose.compose import compose, create_run
from prl.errors import InfrastructureError
from prl.testing import check_weight_transport
from prl.types import Manifest
from prl_nccl import NcclConfig
from prl_nccl.pair import backend_for
from prl_nccl.receiver import NcclReceiver, receive
from prl_nccl.sender import KEPT, NcclSender, send

CONFIG = Path(__file__).parents[2] / "configs" / "spell_backward.toml"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nccl") / "run"
    composition = compose(CONFIG, plugins="nccl", overrides=['weights.type="nccl"', f'run.dir="{folder}"'])
    return create_run(composition, CONFIG).path


@pytest.fixture
def sender(run_dir: Path) -> Iterator[NcclSender]:
    sender = send(NcclConfig(), run_dir, 0)
    yield sender
    sender.close()


@pytest.fixture
def receiver(run_dir: Path) -> NcclReceiver:
    return receive(NcclConfig(deadline=20.0), run_dir)


def weights(version: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(version)
    return {"a": torch.randn(5, 3, generator=draw), "b": torch.randn(7, generator=draw).to(torch.bfloat16)}


def same(fetched: dict[str, torch.Tensor], sent: dict[str, torch.Tensor]) -> bool:
    return fetched.keys() == sent.keys() and all(torch.equal(fetched[name], sent[name]) for name in sent)


def test_the_contract_of_transports_holds(run_dir: Path) -> None:
    check_weight_transport(lambda rank: send(NcclConfig(), run_dir, rank), receive(NcclConfig(), run_dir))


def test_a_part_may_be_larger_than_a_message(
    sender: NcclSender, receiver: NcclReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prl_nccl.pair.CHUNK", 1000)
    sent = {"large": torch.randn(3, 1234)}
    assert same(dict(receiver.fetch(sender.send(1, sent.items()))), sent)


def test_another_process_fetches_it_too(sender: NcclSender, run_dir: Path) -> None:
    manifest = sender.send(3, weights(3).items())
    program = f"""
import cattrs, pathlib
from prl.types import Manifest
from prl_nccl import NcclConfig
from prl_nccl.receiver import receive
manifest = cattrs.structure({cattrs.unstructure(manifest)!r}, Manifest)
for name, tensor in receive(NcclConfig(), pathlib.Path({str(run_dir)!r})).fetch(manifest):
    print(name, float(tensor.double().sum()))
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.splitlines() == [f"{name} {float(tensor.double().sum())}" for name, tensor in weights(3).items()]


def test_only_the_newest_versions_take_memory(sender: NcclSender, receiver: NcclReceiver) -> None:
    manifests = [sender.send(version, weights(version).items()) for version in range(8, 8 + KEPT + 1)]
    with pytest.raises(InfrastructureError, match=r"weights of version 8: version 8 is gone from 127\.0\.0\.1:\d+$"):
        list(receiver.fetch(manifests[0]))
    assert all(same(dict(receiver.fetch(m)), weights(m.version)) for m in manifests[1:])


def test_a_flipped_byte_is_refused(sender: NcclSender, receiver: NcclReceiver) -> None:
    manifest = sender.send(4, weights(4).items())
    sender._held[4][manifest.tensors[1].offset] ^= 1
    with pytest.raises(InfrastructureError, match="weights of version 4: tensor b has checksum"):
        list(receiver.fetch(manifest))


def test_a_part_of_another_size_is_refused(sender: NcclSender, receiver: NcclReceiver) -> None:
    manifest = sender.send(4, weights(4).items())
    sender._held[4] = sender._held[4][:-1]
    with pytest.raises(InfrastructureError, match=r"weights of version 4: .* has 77 bytes where 78 were announced"):
        list(receiver.fetch(manifest))


@pytest.mark.parametrize("location", ["/etc/hostname", "1234", "host:port", ":1"])
def test_a_location_is_an_address(receiver: NcclReceiver, location: str) -> None:
    with pytest.raises(InfrastructureError, match=r"weights of version 1: .* is no address of a trainer rank"):
        list(receiver.fetch(Manifest.single(version=1, location=location, tensors=())))


def test_who_does_not_know_the_token_gets_nothing(sender: NcclSender, receiver: NcclReceiver) -> None:
    manifest = sender.send(1, weights(1).items())
    with pytest.raises(InfrastructureError, match="weights of version 1: the token is not this run's"):
        list(attrs.evolve(receiver, token="guessed").fetch(manifest))


# --- whoever is lost --------------------------------------------------------------------------------------------------
def asked(sender: NcclSender, ask: bytes) -> socket.socket:
    """A connection on which that was said."""
    host, _, port = sender.location.partition(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(ask)
    return connection


def test_receivers_that_hang_or_die_keep_nobody_waiting(
    run_dir: Path, sender: NcclSender, receiver: NcclReceiver
) -> None:
    """They ask for a version and are not heard of again, some before and some after the answer."""
    manifest = sender.send(1, weights(1).items())
    ask = json.dumps({"token": receiver.token, "version": 1, "device": "cpu"}).encode() + b"\n"
    silent, hanging, gone = asked(sender, b""), asked(sender, ask), asked(sender, ask)
    for connection in (hanging, gone):
        assert set(json.loads(connection.makefile("rb").readline())) == {"port", "backend", "nbytes"}
    gone.close()
    assert same(dict(receiver.fetch(manifest)), weights(1))
    assert same(dict(receiver.fetch(sender.send(2, weights(2).items()))), weights(2))
    for connection in (silent, hanging):
        connection.close()


def test_a_transfer_ends_at_its_deadline(run_dir: Path, receiver: NcclReceiver) -> None:
    sender = send(NcclConfig(deadline=0.2), run_dir, 0)
    sender.send(1, weights(1).items())
    before = set(threading.enumerate())
    ask = json.dumps({"token": receiver.token, "version": 1, "device": "cpu"}).encode() + b"\n"
    with asked(sender, ask) as hanging:
        hanging.makefile("rb").readline()
        for transfer in set(threading.enumerate()) - before:
            transfer.join(60)
            assert not transfer.is_alive()
    sender.close()


def test_a_trainer_that_was_started_again_is_another_address(run_dir: Path, receiver: NcclReceiver) -> None:
    first = send(NcclConfig(), run_dir, 0)
    old = first.send(1, weights(1).items())
    assert same(dict(receiver.fetch(old)), weights(1))
    first.close()
    with pytest.raises(InfrastructureError, match=r"weights of version 1 did not come from .*: .* refused"):
        list(receiver.fetch(old))
    second = send(NcclConfig(), run_dir, 0)
    assert same(dict(receiver.fetch(second.send(1, weights(9).items()))), weights(9))
    second.close()


def test_nccl_joins_two_gpus_and_gloo_the_rest() -> None:
    assert [backend_for(*pair) for pair in (("cpu", "cpu"), ("cpu", "A"), ("A", "cpu"), ("A", "A"), ("A", "B"))] == [
        *["gloo"] * 4,
        "nccl",
    ]
