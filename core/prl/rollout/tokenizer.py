"""Text to token ids and back: a Hugging Face tokenizer.json, or a small alphabet that the config spells out.

Ordinary text never becomes a special token: whoever can put `<|im_end|>` into a prompt must not be able to end a turn
with it. Special ids come from `special` alone. Imports no torch; called by renderers and by every process that builds
one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prl.compose.config import TokenizerSection
from prl.errors import UserError
from prl.providers import Model, Tokenizer

if TYPE_CHECKING:
    from prl.compose.compose import Composition

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""What an id without a text decodes to: a model may have more ids than its tokenizer."""


def load(section: TokenizerSection, special_tokens: Sequence[str]) -> Tokenizer:
    """The run's tokenizer. `special_tokens` are those of the model's chat format; a file must bring its own."""
    if bool(section.file) == bool(section.characters):
        given = "both" if section.file else "neither"
        raise UserError(f"[tokenizer] needs exactly one of file and characters, got {given}")
    if section.file:
        return FileTokenizer(Path(section.file), special_tokens)
    return CharacterTokenizer(section.characters, special_tokens)


def vocab_size_of(composition: Composition) -> int:
    """Of a run's tokenizer, with the special tokens of its model."""
    provider = composition.provider(composition.run.model)
    assert isinstance(provider, Model)
    return load(composition.run.tokenizer, provider.special_tokens).vocab_size


class CharacterTokenizer:
    """One token per character. Special tokens come first, so that a longer alphabet keeps all ids.

    Example:
        >>> CharacterTokenizer("ab", ["<|end|>"]).encode("ba")
        [2, 1]
    """

    def __init__(self, characters: str, special_tokens: Sequence[str]) -> None:
        repeated = [character for character, count in Counter(characters).items() if count > 1]
        if repeated:
            raise UserError(f"tokenizer.characters repeats {_quoted(repeated)}: name every character once")
        self._texts = [*special_tokens, *characters]
        self._special = {token: index for index, token in enumerate(special_tokens)}
        self._ids = {character: len(special_tokens) + index for index, character in enumerate(characters)}
        self.vocab_size = len(self._texts)

    def encode(self, text: str) -> list[int]:
        """UserError names the characters of `text` that are not in the alphabet."""
        try:
            return [self._ids[character] for character in text]
        except KeyError:
            unknown = sorted(set(text) - self._ids.keys())
            raise UserError(
                f"tokenizer.characters lacks {_quoted(unknown)}, needed for {_excerpt(text)}; add to it, or set "
                "tokenizer.file to a tokenizer.json that knows all text"
            ) from None

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self._texts[token] if 0 <= token < self.vocab_size else _UNKNOWN for token in tokens)

    def special(self, token: str) -> int:
        return _special(self._special.get(token), token, "the character tokenizer")


class FileTokenizer:
    """A tokenizer.json as the `tokenizers` package reads it."""

    def __init__(self, file: Path, special_tokens: Sequence[str]) -> None:
        self._file = file
        self._tokenizer = _read(file)
        known = [token for token in special_tokens if self._tokenizer.token_to_id(token) is not None]
        # Some files list chat markers as ordinary added tokens; marked as special they keep their ids, and text that
        # spells one is tokenised like any other text.
        self._tokenizer.add_special_tokens(known)
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text

    def special(self, token: str) -> int:
        return _special(self._tokenizer.token_to_id(token), token, str(self._file))


def _read(file: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    if not file.is_file():
        raise UserError(f"tokenizer.file: there is no file {str(file)!r}")
    try:
        return Backend.from_file(str(file))
    except Exception as error:  # the package raises bare Exception for every damaged file
        raise UserError(f"tokenizer.file: {str(file)!r} is not a tokenizer.json: {error}") from error


def _special(found: int | None, token: str, where: str) -> int:
    if found is None:
        raise UserError(f"{where} has no special token {token!r}, which the model's chat format needs")
    return found


def _quoted(characters: Sequence[str]) -> str:
    return ", ".join(map(repr, characters))


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
