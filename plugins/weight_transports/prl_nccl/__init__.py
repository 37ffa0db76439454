"""Weights from every trainer rank straight to every worker of an engine, over process groups of two.

NCCL between two GPUs, gloo where either side computes on a CPU or both share a GPU. Crosses hosts, and writes no files.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from prl import hookimpl
from prl.compose.config import WeightTransportConfig
from prl.providers import WeightTransport


@attrs.frozen(kw_only=True)
class NcclConfig(WeightTransportConfig):
    """`[weights]` with `type = "nccl"`."""


@hookimpl
def prl_weight_transports() -> Iterable[WeightTransport]:
    yield WeightTransport(
        name="nccl",
        config=NcclConfig,
        summary="process groups between trainer ranks and engines, on any hosts: NCCL between GPUs, gloo elsewhere",
        send="prl_nccl.sender:send",
        receive="prl_nccl.receiver:receive",
    )
