"""Weights over process groups of two, here over gloo."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
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
from prl.weights.tensors import record_of
from prl_nccl import NcclConfig
from prl_nccl.pair import Pair, backend_for
from prl_nccl.receiver import Fetch, Link, Lot, NcclReceiver, receive
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
    monkeypatch.setattr("prl.weights.host_memory.GRID", 1 << 10)
    sent = {"large": torch.randn(3, 1234)}
    assert same(dict(receiver.fetch(sender.send(1, sent.items()))), sent)


def test_another_process_fetches_it_too(sender: NcclSender, run_dir: Path) -> None:
    manifest = sender.send(3, weights(3).items())
    program = f"""
import cattrs, pathlib
from prl.types import Manifest
from prl.weights.tensors import record_of
from prl_nccl import NcclConfig
from prl_nccl.receiver import receive
manifest = cattrs.structure({cattrs.unstructure(manifest)!r}, Manifest)
for name, tensor in receive(NcclConfig(), pathlib.Path({str(run_dir)!r})).fetch(manifest):
    print(name, float(tensor.double().sum()))
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.splitlines() == [f"{name} {float(tensor.double().sum())}" for name, tensor in weights(3).items()]


def test_a_rank_sends_what_is_wanted_and_no_more(sender: NcclSender, receiver: NcclReceiver) -> None:
    sent = {f"layers.{layer}.experts.{expert}.up": torch.randn(4, 64) for layer in range(3) for expert in range(4)}
    manifest = sender.send(5, sent.items())
    for experts in ("01", "3"):
        chosen = {name: tensor for name, tensor in sent.items() if name.split(".")[3] in experts}
        before = sender.sent_bytes.get(5, 0)
        assert same(dict(receiver.fetch(manifest.only(chosen.__contains__))), chosen)
        assert sender.sent_bytes[5] - before == len(chosen) * 4 * 64 * 4


def test_only_the_newest_versions_take_memory(sender: NcclSender, receiver: NcclReceiver) -> None:
    manifests = [sender.send(version, weights(version).items()) for version in range(8, 8 + KEPT + 1)]
    with pytest.raises(InfrastructureError, match=r"weights of version 8: version 8 is gone from 127\.0\.0\.1:\d+$"):
        list(receiver.fetch(manifests[0]))
    assert all(same(dict(receiver.fetch(m)), weights(m.version)) for m in manifests[1:])


def test_a_flipped_byte_is_refused(sender: NcclSender, receiver: NcclReceiver) -> None:
    manifest = sender.send(4, weights(4).items())
    place = manifest.tensors[1].offset
    sender._held[4].span(place, place + 1)[0] ^= 1
    with pytest.raises(InfrastructureError, match="weights of version 4: tensor b has checksum"):
        list(receiver.fetch(manifest))


def test_a_part_of_another_size_is_refused(sender: NcclSender, receiver: NcclReceiver) -> None:
    manifest = sender.send(4, weights(4).items())
    sender._held[4].end -= 1
    with pytest.raises(
        InfrastructureError, match=r"weights of version 4: version 4 at .* is another: bytes 0 to 78 of 77"
    ):
        list(receiver.fetch(manifest))


@pytest.mark.parametrize("location", ["/etc/hostname", "1234", "host:port", ":1"])
def test_a_location_is_an_address(receiver: NcclReceiver, location: str) -> None:
    records = (record_of("a", torch.zeros(3), 0, 0),)
    with pytest.raises(InfrastructureError, match=r"weights of version 1: .* is no address of a trainer rank"):
        list(receiver.fetch(Manifest.single(version=1, location=location, tensors=records)))


def test_who_does_not_know_the_token_gets_nothing(sender: NcclSender, receiver: NcclReceiver) -> None:
    manifest = sender.send(1, weights(1).items())
    with pytest.raises(InfrastructureError, match="weights of version 1: the token is not this run's"):
        list(attrs.evolve(receiver, token="guessed").fetch(manifest))


# --- groups that are kept ---------------------------------------------------------------------------------------------
def test_the_next_version_comes_through_the_same_group(sender: NcclSender, receiver: NcclReceiver) -> None:
    groups = set()
    for version in (1, 2, 3):
        assert same(dict(receiver.fetch(sender.send(version, weights(version).items()))), weights(version))
        (link,) = receiver._links.values()
        groups.add(id(link.pair))
    assert len(groups) == 1


def test_a_group_that_the_rank_has_given_up_is_made_again(sender: NcclSender, receiver: NcclReceiver) -> None:
    manifest = sender.send(1, weights(1).items())
    assert same(dict(receiver.fetch(manifest)), weights(1))
    (first,) = receiver._links.values()
    (connection,) = sender._server.connections
    connection.shutdown(socket.SHUT_RDWR)
    assert same(dict(receiver.fetch(manifest)), weights(1))
    (second,) = receiver._links.values()
    assert second is not first


def test_two_versions_may_come_at_a_time(sender: NcclSender, receiver: NcclReceiver) -> None:
    """As where a prepare was given up for the next one."""
    old, new = (sender.send(version, weights(version).items()) for version in (1, 2))
    coming = receiver.fetch(old)
    first = dict([next(coming)])
    assert same(dict(receiver.fetch(new)), weights(2))
    assert same({**first, **dict(coming)}, weights(1))
    assert len(receiver._links) == 1


def test_who_stops_in_the_middle_leaves_no_half_read_group(sender: NcclSender, receiver: NcclReceiver) -> None:
    manifest = sender.send(1, weights(1).items())
    coming = receiver.fetch(manifest)
    next(coming)
    coming.close()
    assert not receiver._links
    assert same(dict(receiver.fetch(manifest)), weights(1))


# --- whoever is lost --------------------------------------------------------------------------------------------------
def asked(sender: NcclSender, hello: bytes) -> socket.socket:
    """A connection on which that was said."""
    host, _, port = sender.location.partition(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(hello)
    return connection


def hello(receiver: NcclReceiver) -> bytes:
    return json.dumps({"token": receiver.token, "device": "cpu", "channels": 1}).encode() + b"\n"


def waiting(receiver: NcclReceiver, manifest: Manifest) -> Link:
    """A worker that has asked for a version and takes none of it."""
    fetch = Fetch(manifest.version, time.monotonic() + 20)
    link = receiver._connected(manifest.parts[0].location, fetch)
    assert link.ask(fetch.version, [Lot(manifest.tensors)], fetch.deadline) == {"nbytes": 78}
    return link


def test_receivers_that_hang_or_die_keep_nobody_waiting(sender: NcclSender, receiver: NcclReceiver) -> None:
    """Some before they are answered, some before there is a group, some when the version is on its way."""
    manifest = sender.send(1, weights(1).items())
    silent, hanging, gone = asked(sender, b""), asked(sender, hello(receiver)), asked(sender, hello(receiver))
    for connection in (hanging, gone):
        assert set(json.loads(connection.makefile("rb").readline())) == {"port", "backend"}
    gone.close()
    full, lost = waiting(receiver, manifest), waiting(receiver, manifest)
    lost.close()
    assert same(dict(receiver.fetch(manifest)), weights(1))
    assert same(dict(receiver.fetch(sender.send(2, weights(2).items()))), weights(2))
    for connection in (silent, hanging):
        connection.close()
    full.close()


def test_meeting_and_transfer_end_at_their_deadlines(run_dir: Path, receiver: NcclReceiver) -> None:
    sender = send(NcclConfig(deadline=0.5), run_dir, 0)
    manifest = sender.send(1, weights(1).items())
    before = set(threading.enumerate())
    with asked(sender, hello(receiver)) as hanging:
        hanging.makefile("rb").readline()
        link = waiting(receiver, manifest)
        for transfer in set(threading.enumerate()) - before:
            transfer.join(60)
            assert not transfer.is_alive()
    assert not sender._server.connections
    link.close()
    sender.close()


def test_a_sender_that_closes_ends_the_groups_it_has(run_dir: Path, receiver: NcclReceiver) -> None:
    before = set(threading.enumerate())
    sender = send(NcclConfig(), run_dir, 0)
    manifest = sender.send(1, weights(1).items())
    assert same(dict(receiver.fetch(manifest)), weights(1))
    sender.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive()
    with pytest.raises(InfrastructureError, match=r"weights of version 1 did not come from .*: .* refused"):
        list(receiver.fetch(manifest))


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


class Never:
    """A message that does not come."""

    def is_completed(self) -> bool:
        return False


def test_over_nccl_a_side_that_is_gone_is_seen_by_its_connection() -> None:
    """NCCL itself waits; asking for more on the connection is no end of it."""
    here, there = socket.socketpair()
    pair = Pair(group=None, device=torch.device("cpu"), connection=here, stream=object())
    there.sendall(b"more")
    with pytest.raises(RuntimeError, match="the time for it is over"):
        pair.wait(Never(), time.monotonic() + 0.1)
    assert here.recv(4) == b"more"
    there.close()
    with pytest.raises(RuntimeError, match="the other side is gone"):
        pair.wait(Never(), time.monotonic() + 60)
    here.close()


def test_nccl_joins_two_gpus_and_gloo_the_rest() -> None:
    assert [backend_for(*pair) for pair in (("cpu", "cpu"), ("cpu", "A"), ("A", "cpu"), ("A", "A"), ("A", "B"))] == [
        *["gloo"] * 4,
        "nccl",
    ]
