"""What vLLM's `/metrics` page says of a server, over all its engine cores, and under the names that engines report."""

from __future__ import annotations

import re
from collections.abc import Mapping

NAMES = {
    "running": "num_requests_running",
    "waiting": "num_requests_waiting",
    "generated_tokens": "generation_tokens_total",
    "prompt_tokens": "prompt_tokens_total",
    "prefix_hit_tokens": "prefix_cache_hits_total",
    "outside_hit_tokens": "external_prefix_cache_hits_total",
    "preemptions": "num_preemptions_total",
    "kv_tokens": "kv_tokens",
    "kv_usage": "kv_cache_usage_perc",
    "fetched_bytes": "nixl_bytes_transferred_sum",
    "host_written_bytes": "kv_offload_store_bytes_total",
    "host_read_bytes": "kv_offload_load_bytes_total",
    "disk_written_bytes": "kv_offload_tiering_write_bytes_total",
    "disk_read_bytes": "kv_offload_tiering_read_bytes_total",
}
"""Ours -> vLLM's, without its prefix. Hits are tokens of prompts; tiers or another engine gave those of `outside`."""
_SHARES = ("kv_cache_usage_perc",)
"""What must not be added up: the fullest core counts, since a sequence cannot move to another."""
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def read(page: str) -> Mapping[str, float]:
    """Name -> value without the prefix `vllm:`: sums over cores and other labels, shares of the fullest core.

    `kv_tokens` is the room for keys and values of all cores in tokens, 0 where the server does not tell it.
    """
    values: dict[str, float] = {"kv_tokens": 0.0}
    for line in page.splitlines():
        if not line.startswith("vllm:"):
            continue
        head, _, value = line.removeprefix("vllm:").rpartition(" ")
        name, _, labels = head.partition("{")
        if name == "cache_config_info":
            values["kv_tokens"] += _room(dict(_LABEL.findall(labels)))
        elif name in _SHARES:
            values[name] = max(values.get(name, 0.0), float(value))
        else:
            values[name] = values.get(name, 0.0) + float(value)
    return values


def _room(labels: Mapping[str, str]) -> float:
    """Tokens of one core. Blocks times their size is wrong where layers differ; older releases tell no more."""
    size = labels.get("kv_cache_size_tokens", "None")
    if size != "None":
        return float(size)
    blocks, block = labels.get("num_gpu_blocks", "None"), labels.get("block_size", "None")
    return 0.0 if "None" in (blocks, block) else float(blocks) * float(block)


def named(metrics: Mapping[str, float]) -> dict[str, float]:
    """0 for what this server has nothing of."""
    return {name: metrics.get(theirs, 0.0) for name, theirs in NAMES.items()}
