"""Weights through memory that the processes of one host share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import attrs
from prl import hookimpl
from prl.compose.config import Run, WeightTransportConfig
from prl.providers import WeightTransport, option


@attrs.frozen(kw_only=True)
class SharedMemoryConfig(WeightTransportConfig):
    """`[weights]` with `type = "shared_memory"`."""

    memory: Literal["host", "device"] = option(
        "host",
        help="where a version waits: in host memory, or on the GPUs of the trainer's ranks, from where engines on GPUs "
        "of the machine copy it; there it takes the bytes of a rank's part twice",
    )


@hookimpl
def prl_weight_transports() -> Iterable[WeightTransport]:
    yield WeightTransport(
        name="shared_memory",
        config=SharedMemoryConfig,
        summary="memory that trainer and engines of one host share",
        send="prl_shared_memory.segments:send",
        receive="prl_shared_memory.segments:receive",
    )


@hookimpl
def prl_validate(run: Run) -> Iterable[str]:
    """Hosts share no memory."""
    if isinstance(run.weights, SharedMemoryConfig) and run.launcher.spans_hosts:
        yield (
            "weights.type = 'shared_memory' reaches the processes of one machine, and the launcher may use several; "
            "choose a transport that crosses hosts, such as 'nccl', or 'disk' on a shared file system"
        )
    if isinstance(run.weights, SharedMemoryConfig) and run.weights.memory == "device" and run.trainer.device == "cpu":
        yield 'weights.memory = "device" is memory of GPUs, and trainer.device = "cpu": leave it out, or train on GPUs'
