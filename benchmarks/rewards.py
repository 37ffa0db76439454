"""The reward of trl_comparison.toml, the same as in trl_grpo.py."""

from __future__ import annotations


async def share_of_a(completion: str) -> float:
    """Where an async function runs is the event loop: a thread would cost more than counting letters does."""
    return completion.count("a") / max(1, len(completion))
