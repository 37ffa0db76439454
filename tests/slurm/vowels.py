"""The reward of these runs: how much of what is said are vowels."""

from __future__ import annotations


def share(completion: str) -> float:
    return sum(letter in "aeiou" for letter in completion) / max(len(completion), 1)
