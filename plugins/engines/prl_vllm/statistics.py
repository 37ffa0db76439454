"""vLLM's metrics under the names that engines report; what moves keys and values has its own."""

from __future__ import annotations

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


def named(metrics: Mapping[str, float]) -> dict[str, float]:
    """0 for what this server has nothing of."""
    return {name: metrics.get(theirs, 0.0) for name, theirs in NAMES.items()}
