"""Weights through memory that the processes of one host share."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from prl import hookimpl
from prl.compose.config import WeightTransportConfig
from prl.providers import WeightTransport


@attrs.frozen(kw_only=True)
class SharedMemoryConfig(WeightTransportConfig):
    """`[weights]` with `type = "shared_memory"`."""


@hookimpl
def prl_weight_transports() -> Iterable[WeightTransport]:
    yield WeightTransport(
        name="shared_memory",
        config=SharedMemoryConfig,
        summary="memory that trainer and engines of one host share",
        send="prl_shared_memory.segments:send",
        receive="prl_shared_memory.segments:receive",
    )
