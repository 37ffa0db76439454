"""The table of devices, `devices.toml`: peaks, rates and where each figure comes from."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import attrs

from prl.errors import UserError


@attrs.frozen(kw_only=True)
class Rates:
    """What kernels and wires reach: operations or bytes per second."""

    dense: float
    experts: float
    attention: float
    attention_backward: float
    index: float
    scan: float
    head: float
    memory: float
    """Bytes read plus written."""
    node: float
    """To the other devices of the node, each way."""
    network: float
    """To other nodes, each way, per device."""
    host: float
    devices_per_node: int


@attrs.frozen(kw_only=True)
class Device:
    """One kind of accelerator."""

    key: str
    name: str
    match: str
    memory: float
    """Bytes."""
    peak: float
    """Operations per second in bfloat16, as published: the denominator of MFU."""
    rates: Rates | None = None
    sources: Mapping[str, str] = attrs.field(factory=dict)


@cache
def table() -> Mapping[str, Device]:
    """Key -> device."""
    stored: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_name("devices.toml").read_text())
    return {
        key: Device(key=key, **{**entry, "rates": Rates(**entry["rates"]) if "rates" in entry else None})
        for key, entry in stored.items()
    }


def named(key: str) -> Device:
    """The device a person asks to plan for; UserError when there are no rates for it."""
    device = table().get(key.lower())
    if device is None or device.rates is None:
        known = ", ".join(key for key, device in table().items() if device.rates)
        raise UserError(f"--device {key}: there are rates for {known}; add yours to prl/plan/devices.toml")
    return device


def recognised(name: str) -> Device | None:
    """The device that torch calls `name`; None for one the table does not know, such as a CPU."""
    return max((d for d in table().values() if d.match in name), key=lambda d: len(d.match), default=None)
