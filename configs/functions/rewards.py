"""Reward functions for configs/functions.toml: called with the completion and, by name, the row's own keys."""

from __future__ import annotations


def closeness(completion: str, answer: str) -> float:
    """Share of the letters that are in their place; 1 only for exactly the answer."""
    right = sum(a == b for a, b in zip(completion, answer, strict=False))
    return right / max(len(completion), len(answer))
