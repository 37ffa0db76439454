"""`GET /metrics`: the engine's statistics in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Mapping

STATISTICS = {
    "running": ("gauge", "sequences that decode"),
    "waiting": ("gauge", "sequences that wait for a row or for their prompt"),
    "sequences": ("gauge", "most sequences that decode at once"),
    "length": ("gauge", "most tokens of a sequence"),
    "kv_tokens": ("gauge", "room for keys and values, in tokens"),
    "kv_usage": ("gauge", "share of that room which sequences hold"),
    "preemptions": ("counter", "sequences that lost their room to others"),
    "paused": ("gauge", "1 while generation is paused"),
    "generated_tokens": ("counter", "tokens sampled"),
    "prompt_tokens": ("counter", "tokens of prompts"),
    "prefix_hit_tokens": ("counter", "tokens of prompts found in the cache"),
    "outside_hit_tokens": ("counter", "tokens of prompts found behind the cache, or in another engine"),
    "handed_tokens": ("counter", "tokens of prompts that another engine computed"),
    "fetched_bytes": ("counter", "keys and values fetched from other engines"),
    "host_written_bytes": ("counter", "keys and values written to host memory"),
    "host_read_bytes": ("counter", "keys and values read from host memory"),
    "disk_written_bytes": ("counter", "keys and values written to disk"),
    "disk_read_bytes": ("counter", "keys and values read from disk"),
    "busy_seconds": ("counter", "seconds in which the model computed"),
    "version": ("gauge", "policy version being served"),
    "updates": ("counter", "weight updates"),
    "update_seconds": ("counter", "seconds in which nothing was computed for them"),
}
"""Name -> kind and meaning; what `Engine.statistics` answers."""


def exposition(statistics: Mapping[str, float]) -> str:
    """Statistics as text, those that the engine has; counters get the suffix `_total` that Prometheus expects."""
    lines = []
    for key, (kind, meaning) in STATISTICS.items():
        if key not in statistics:
            continue
        name = f"prl_engine_{key}" + ("_total" if kind == "counter" else "")
        lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", f"{name} {statistics[key]:.17g}"]
    return "\n".join(lines) + "\n"
