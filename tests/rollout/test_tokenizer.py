from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prl.compose.config import TokenizerSection
from prl.errors import UserError
from prl.rollout.tokenizer import CharacterTokenizer, FileTokenizer, load
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
ALPHABET = "abcdefghijklmnopqrstuvwxyz<|_>\n"


def byte_level_file(folder: Path, *, special: bool = True) -> Path:
    """A small byte-level BPE like Qwen's; `special` is how the file marks the chat tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the user asks the assistant", "<|im_end|> is how a turn ends"] * 3, trainer)
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))]
    )
    file = folder / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.fixture(scope="module", params=[True, False], ids=["special", "merely added"])
def from_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FileTokenizer:
    return FileTokenizer(byte_level_file(tmp_path_factory.mktemp("bpe"), special=request.param), SPECIAL)


# --- characters -------------------------------------------------------------------------------------------------------
def test_special_tokens_come_first_and_characters_follow_in_order() -> None:
    tokenizer = CharacterTokenizer("xyz", SPECIAL)
    assert [tokenizer.special(token) for token in SPECIAL] == [0, 1, 2]
    assert tokenizer.encode("zxy") == [5, 3, 4]
    assert tokenizer.vocab_size == 6


def test_a_longer_alphabet_keeps_the_ids() -> None:
    text = "hello"
    assert CharacterTokenizer("helo", SPECIAL).encode(text) == CharacterTokenizer("helowrd", SPECIAL).encode(text)


@given(st.text(ALPHABET))
def test_characters_round_trip(text: str) -> None:
    tokenizer = CharacterTokenizer(ALPHABET, SPECIAL)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(st.one_of(st.text(ALPHABET), st.sampled_from(SPECIAL))).map("".join))
def test_text_never_becomes_a_special_character_token(text: str) -> None:
    assert not set(CharacterTokenizer(ALPHABET, SPECIAL).encode(text)) & {0, 1, 2}


def test_unknown_characters_are_named_with_what_to_do() -> None:
    with pytest.raises(UserError, match=r"characters lacks '!', 'é', needed for 'aé!a'; add to it, or set"):
        CharacterTokenizer("ab", SPECIAL).encode("aé!a")


def test_repeated_characters_are_named() -> None:
    with pytest.raises(UserError, match="repeats 'b', ' ': name every character once"):
        CharacterTokenizer("ab cb d", SPECIAL)


def test_special_tokens_and_foreign_ids_decode() -> None:
    tokenizer = CharacterTokenizer("ab", SPECIAL)
    assert tokenizer.decode([3, 1, 4, 99, -1]) == "a<|im_end|>b��"


# --- files ------------------------------------------------------------------------------------------------------------
@given(text=st.text())
@settings(max_examples=50, deadline=None)
def test_text_round_trips_through_a_file(from_file: FileTokenizer, text: str) -> None:
    assert from_file.decode(from_file.encode(text)) == text


@given(text=st.lists(st.one_of(st.text(max_size=5), st.sampled_from(SPECIAL))).map("".join))
@settings(max_examples=50, deadline=None)
def test_text_never_becomes_a_special_token_of_a_file(from_file: FileTokenizer, text: str) -> None:
    special = {from_file.special(token) for token in SPECIAL}
    assert not set(from_file.encode(text)) & special


def test_a_file_brings_its_special_ids(from_file: FileTokenizer) -> None:
    ids = [from_file.special(token) for token in SPECIAL]
    assert ids == [280, 281, 282]
    assert from_file.vocab_size == 283
    assert from_file.decode([ids[1], *from_file.encode("a")]) == "<|im_end|>a"


def test_a_file_without_the_chat_tokens(tmp_path: Path) -> None:
    tokenizer = FileTokenizer(byte_level_file(tmp_path), ["<|other|>"])
    with pytest.raises(UserError, match=r"tokenizer\.json has no special token '<\|other\|>'"):
        tokenizer.special("<|other|>")


# --- the section ------------------------------------------------------------------------------------------------------
def test_the_section_chooses(tmp_path: Path) -> None:
    assert load(TokenizerSection(characters="ab"), SPECIAL).vocab_size == 5
    assert load(TokenizerSection(file=str(byte_level_file(tmp_path))), SPECIAL).vocab_size == 283


@pytest.mark.parametrize(("section", "given"), [(("", ""), "neither"), (("x", "ab"), "both")])
def test_a_section_with_neither_or_both(section: tuple[str, str], given: str) -> None:
    with pytest.raises(UserError, match=f"exactly one of file and characters, got {given}"):
        load(TokenizerSection(file=section[0], characters=section[1]), SPECIAL)


def test_a_file_that_is_absent_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        load(TokenizerSection(file=str(tmp_path / "tokenizer.json")), SPECIAL)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        load(TokenizerSection(file=str(tmp_path / "tokenizer.json")), SPECIAL)


def test_a_character_tokenizer_without_the_special_token() -> None:
    with pytest.raises(UserError, match=r"no special token '<\|pad\|>'"):
        CharacterTokenizer("ab", SPECIAL).special("<|pad|>")
