"""Where processes listen: every word of `run.network`."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import ClassVar

import attrs
import pytest
from prl import network
from prl.compose.compose import compose
from prl.compose.config import LauncherConfig, Run
from prl.errors import UserError

LOOPBACK_INTERFACE = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "")


@attrs.frozen(kw_only=True)
class ManyHosts(LauncherConfig):
    spans_hosts: ClassVar[bool] = True


def run_on(config: Path, where: str, launcher: LauncherConfig | None = None) -> Run:
    run = compose(config, overrides=[f"run.network={where}"]).run
    return attrs.evolve(run, launcher=launcher) if launcher else run


def test_one_machine_keeps_to_itself_and_several_use_their_names(toy_config: Path) -> None:
    assert network.address(run_on(toy_config, "auto")) == "127.0.0.1"
    here = socket.gethostbyname(socket.gethostname())
    assert network.address(run_on(toy_config, "auto", ManyHosts())) == here
    assert network.address(run_on(toy_config, "hostname")) == here
    assert network.address(run_on(toy_config, "loopback", ManyHosts())) == "127.0.0.1"


@pytest.mark.parametrize("word", [LOOPBACK_INTERFACE, "127.0.0.0/8"])
def test_an_interface_and_a_network_name_the_address_in_it(word: str) -> None:
    assert network.resolve(word) == "127.0.0.1"


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("ib7", r"run.network = 'ib7' is nowhere on .*, which has .* 127.0.0.1"),
        ("203.0.113.0/24", "run.network = '203.0.113.0/24' is nowhere on "),
        ("10.0.0.1/8", "run.network = '10.0.0.1/8' is no IPv4 network: 10.0.0.1/8 has host bits set"),
    ],
)
def test_what_leads_nowhere_is_said(word: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        network.resolve(word)


def test_every_loopback_address_belongs_to_the_loopback_interface() -> None:
    assert network.interface("127.0.1.14") == LOOPBACK_INTERFACE
    assert network.interface("203.0.113.1") is None
