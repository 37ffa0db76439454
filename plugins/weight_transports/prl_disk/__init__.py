"""Weights through files: one safetensors file per version in the run directory."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from prl import hookimpl
from prl.compose.config import WeightTransportConfig
from prl.providers import WeightTransport


@attrs.frozen(kw_only=True)
class DiskConfig(WeightTransportConfig):
    """`[weights]` with `type = "disk"`."""


@hookimpl
def prl_weight_transports() -> Iterable[WeightTransport]:
    yield WeightTransport(
        name="disk",
        config=DiskConfig,
        summary="safetensors files under <run>/weights, for engines that share the file system",
        send="prl_disk.files:send",
        receive="prl_disk.files:receive",
    )
