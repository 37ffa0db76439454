"""Which generated items are tasks of which split: disjoint by content, distinct, and the same in every process.

An item is identified by its question. A tenth of all possible questions, chosen by their hash alone, is held out; so no
question is ever in both splits, whatever the seed, the size or the difficulty, and two sections over one dataset agree
on what is held out. Generators repeat themselves, so items are read in order until enough distinct ones are found.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from prl.types import Split

HELD_OUT = 10  # one question in so many
_PATIENCE = 4  # items read per item that would do if a generator never repeated itself


def identity(question: str) -> int:
    """A hash that is the same in every process; upper and lower case make no other task."""
    return int.from_bytes(hashlib.sha256(question.casefold().encode()).digest()[:8], "big")


def split_of(question: str) -> Split:
    return "eval" if identity(question) % HELD_OUT == 0 else "train"


def items_to_read(wanted: Mapping[Split, int]) -> int:
    """How many items of a generator are looked at, at most, to find `wanted`."""
    expected = max(wanted["train"] * HELD_OUT / (HELD_OUT - 1), wanted["eval"] * HELD_OUT)
    return max(1, math.ceil(_PATIENCE * expected))


def select(questions: Iterable[str], wanted: Mapping[Split, int], seen: set[int]) -> dict[Split, list[int]]:
    """Numbers of the first items with a new question, `wanted` for each split, or fewer when `questions` end.

    `seen` holds the identities that are taken, and is added to.
    """
    found: dict[Split, list[int]] = {"train": [], "eval": []}
    for number, question in enumerate(questions):
        if all(len(found[split]) == wanted[split] for split in found):
            break
        key, split = identity(question), split_of(question)
        if key not in seen and len(found[split]) < wanted[split]:
            seen.add(key)
            found[split].append(number)
    return found


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` divided in proportion to `weights`, to whole numbers that sum to it."""
    bounds = [0.0]
    for weight in weights:
        bounds.append(bounds[-1] + weight)
    ends = [round(total * bound / bounds[-1]) for bound in bounds]
    return [end - start for start, end in pairwise(ends)]


def interleave(columns: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(column, entry) of every entry, so that any stretch holds the columns in about their proportion."""
    places = (
        ((position + 0.5) / len(column), index, entry)
        for index, column in enumerate(columns)
        for position, entry in enumerate(column)
    )
    return [(index, entry) for _, index, entry in sorted(places)]
