"""What vLLM's `/metrics` page says of a server, over all its engine cores."""

from __future__ import annotations

import re
from collections.abc import Mapping

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
