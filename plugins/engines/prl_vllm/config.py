"""`[engine]` with `type = "vllm"`. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs
from attrs import validators
from prl import option
from prl.compose.config import EngineConfig, not_negative, positive

AllToAll = Literal[
    "allgather_reducescatter",
    "deepep_high_throughput",
    "deepep_low_latency",
    "deepep_v2",
    "flashinfer_nvlink_two_sided",
]
"""How tokens reach the devices of their experts; DeepEP's first kind is for prefill, its second for decoding, its
version 2 for both."""


@attrs.frozen(kw_only=True)
class Parallel:
    """`[engine.parallel]`: how the devices of one engine share the model."""

    nodes: int = option(
        1, help="nodes of one engine, each with as many copies (data) and devices of it", validator=positive
    )
    tensor: int = option(1, help="devices that share every matrix", validator=positive)
    data: int = option(1, help="copies of the attention, each with sequences of its own", validator=positive)
    experts: bool = option(False, help="each device has some experts whole, instead of a part of every expert")
    all_to_all: AllToAll = option("allgather_reducescatter", help="how tokens reach the devices of their experts")
    redundant_experts: int = option(
        0, help="copies of much used experts, placed anew as use changes (EPLB)", validator=not_negative
    )

    @property
    def local(self) -> int:
        """Copies on each node."""
        return self.data // self.nodes


@attrs.frozen(kw_only=True)
class Prefill:
    """`[engine.prefill]`: engines that compute prompts for the others, which then only decode. NIXL joins them."""

    count: int = option(
        0, help="how many of engine.count; 0: every engine computes its own prompts", validator=not_negative
    )
    patience: float = option(
        60.0,
        help="seconds a prompt may take there; then the engine that decodes computes it itself",
        validator=positive,
    )


@attrs.frozen(kw_only=True)
class KvTiers:
    """`[engine.kv_tiers]`: where keys and values go that the devices have no room for."""

    host_bytes: int = option(0, help="host memory of one engine for them; 0: none", validator=not_negative)
    disk: str = option("", help="folder behind the host memory, which engines may share; empty: none")


@attrs.frozen(kw_only=True)
class Fp8:
    """`[engine.fp8]`: what is computed in 8-bit floating point, quantised by vLLM as weights arrive."""

    weights: bool = option(False, help="linear layers and experts")
    kv_cache: bool = option(False, help="keys and values")
    deep_gemm: bool = option(True, help="DeepGEMM's kernels, where the device has them")


@attrs.frozen(kw_only=True)
class VllmConfig(EngineConfig):
    """`[engine]` with `type = "vllm"`.

    Example:
        [engine]
        type = "vllm"
        sequences = 128
        options = { gpu_memory_utilization = 0.8, compilation_config = { cudagraph_mode = "FULL" } }
    """

    sequences: int = option(64, help="sequences that decode at once (vLLM's max_num_seqs)", validator=positive)
    length: int = option(0, help="most tokens of a sequence; 0: rollouts.sequence_length", validator=not_negative)
    threads: int = option(1, help="CPU threads of the model, where it runs on a CPU", validator=positive)
    kv_cache_bytes: int = option(
        0, help="room for keys and values; 0: 256 MiB on a CPU, vLLM's own choice elsewhere", validator=not_negative
    )
    on_update: Literal["keep", "recompute"] = option(
        "keep",
        help="what unfinished sequences go on with after a weight update: the keys and values they have, or new ones, "
        "computed again under the new weights",
    )
    staging: Literal["host", "device"] = option(
        "host",
        help="where a new version waits to be served; device: a shorter pause, for room for all weights once more",
    )
    prefix_caching: bool = option(
        True, help="prompts reuse what others computed under the same policy version, where the model allows it"
    )
    parallel: Parallel = option(attrs.Factory(Parallel), help="devices of one engine")
    prefill: Prefill = option(attrs.Factory(Prefill), help="engines for prompts alone")
    kv_tiers: KvTiers = option(attrs.Factory(KvTiers), help="room for keys and values beyond the devices'")
    fp8: Fp8 = option(attrs.Factory(Fp8), help="8-bit serving")
    options: Mapping[str, Any] = option(
        attrs.Factory(dict), help="any other argument of vLLM's server, under its Python name; tables become JSON"
    )
    environment: Mapping[str, str] = option(
        attrs.Factory(dict), help="environment variables of vLLM's processes", validator=validators.instance_of(Mapping)
    )
    servers: tuple[str, ...] = option(
        (), help="URLs of vLLM servers that run already, one for each engine; empty: they are started (docs/vllm.md)"
    )
    startup: float = option(900.0, help="seconds a server has to start", validator=positive)

    @property
    def gpus(self) -> int:
        """Devices of one engine."""
        return self.parallel.tensor * self.parallel.data

    @property
    def spans(self) -> int:
        return self.parallel.nodes

    def share_of(self, node: int) -> str:
        local = self.parallel.local
        first = node * local
        return f"data ranks {first}-{first + local - 1} of {self.parallel.data}"

    def kind_of(self, index: int) -> str:
        """The first `prefill.count` engines compute prompts, the others decode."""
        if not self.prefill.count:
            return ""
        return "prefill" if index < self.prefill.count else "decode"
