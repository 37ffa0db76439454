"""Text with special tokens in it: what a chat format writes, and what a sampled turn is read as.

    [Marker("<|user|>"), "hi <|user|>"]   <->   [3, ...the tokens of "hi <|user|>" as plain text]

Only a `Marker` becomes a special token, and only a special token becomes a `Marker`, so nobody can end a turn or make a
tool call by spelling one in a message. Knows no chat format; `prl.rollout.turns` and the formats are written in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TypeAlias

import attrs

from prl.providers import Tokenizer


@attrs.frozen
class Marker:
    """A special token where it stands in a text. Equal to no string, not even to the one that spells it."""

    token: str


Part: TypeAlias = str | Marker


class Markup:
    """Parts to token ids and back, for a tokenizer that has all of `markers`; UserError names one it lacks."""

    def __init__(self, tokenizer: Tokenizer, markers: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._ids = {Marker(marker): tokenizer.special(marker) for marker in markers}
        self._markers = {token: marker for marker, token in self._ids.items()}

    def encode(self, parts: Iterable[Part]) -> list[int]:
        """Text between two markers is tokenised in one piece, as the templates of published models are."""
        tokens: list[int] = []
        for is_text, run in groupby(parts, lambda part: isinstance(part, str)):
            if is_text:
                tokens += self._tokenizer.encode("".join(part for part in run if isinstance(part, str)))
            else:
                tokens += [self._ids[part] for part in run if isinstance(part, Marker)]
        return tokens

    def decode(self, tokens: Iterable[int]) -> list[Part]:
        """Markers, and the text between them in one piece each."""
        return list(self._decoded(tokens))

    def _decoded(self, tokens: Iterable[int]) -> Iterator[Part]:
        for marker, run in groupby(tokens, self._markers.get):
            if marker is None:
                yield self._tokenizer.decode(list(run))
            else:
                yield from (marker for _ in run)


def marked(text: str, markers: Sequence[str]) -> list[Part]:
    """A format's own text, its markers made special. Never for what a message says."""
    pieces = re.split("(" + "|".join(map(re.escape, markers)) + ")", text)
    return [Marker(piece) if piece in markers else piece for piece in pieces if piece]


def spelled(parts: Iterable[Part]) -> str:
    """Parts as text, markers as they are spelled."""
    return "".join(part if isinstance(part, str) else part.token for part in parts)


def enclosed(parts: Sequence[Part], begin: Marker, end: Marker) -> tuple[Sequence[Part], Sequence[Part]] | None:
    """What stands between a leading `begin` (blank text may precede) and the next `end`, and what follows, or None."""
    first = 1 if parts and isinstance(parts[0], str) and not parts[0].strip() else 0
    if list(parts[first : first + 1]) != [begin] or end not in parts:
        return None
    last = parts.index(end)
    return parts[first + 1 : last], parts[last + 1 :]
