"""`[engine]` with `type = "vllm"`. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs
from attrs import validators
from prl import option
from prl.compose.config import EngineConfig, not_negative, positive


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
    prefix_caching: bool = option(
        True, help="prompts reuse what others computed under the same policy version, where the model allows it"
    )
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
