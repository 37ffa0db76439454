"""The reward of trl_comparison.toml, the same as in trl_grpo.py."""

from __future__ import annotations


def share_of_a(completion: str) -> float:
    return completion.count("a") / max(1, len(completion))
