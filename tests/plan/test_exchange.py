"""Bytes between ranks and seconds, by hand, for groups inside a node and across nodes."""

from __future__ import annotations

import attrs
import pytest
from prl.plan.devices import named, recognised, table
from prl.plan.exchange import replicate
from prl.train.layout import Layout

RATES = attrs.evolve(named("h200").rates, node=400.0, network=50.0, devices_per_node=8)


def test_copies_within_a_node_use_its_own_wires() -> None:
    exchange = replicate(1000, Layout(replicate=4), RATES)
    assert exchange.bytes == 2 * 1000 * 3 / 4
    assert exchange.seconds == pytest.approx(2 * 750 / 400)


def test_copies_on_other_nodes_are_as_slow_as_the_network() -> None:
    exchange = replicate(1000, Layout(replicate=2, shard=8), RATES)
    assert exchange.bytes == 2 * 1000 / 2
    assert exchange.seconds == pytest.approx(2 * 500 / 50)


def test_a_single_copy_exchanges_nothing() -> None:
    assert replicate(1000, Layout(shard=16), RATES).bytes == 0.0


def test_devices_are_known_by_their_names() -> None:
    assert recognised("NVIDIA H200").key == "h200"
    assert recognised("NVIDIA H20").key == "h20"
    assert recognised("NVIDIA H100 80GB HBM3").key == "h100"
    assert recognised("cpu") is None
    assert all(device.peak > 0 and device.sources for device in table().values())
