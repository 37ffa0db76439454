"""Markers become special tokens and text never does."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from prl.rollout.markup import Marker, Markup, Part, enclosed, marked, spelled

from tests.plugins.conversations import EveryCharacter, some

TOKENS = ("<a>", "<b>")
A, B = map(Marker, TOKENS)
TOKENIZER = EveryCharacter(TOKENS)
MARKUP = Markup(TOKENIZER, TOKENS)


def test_a_marker_is_not_the_text_that_spells_it() -> None:
    assert MARKUP.encode([A, "<a>"]) == [0, *TOKENIZER.encode("<a>")]
    assert MARKUP.decode([0, *TOKENIZER.encode("<a>"), 1, 1]) == [A, "<a>", B, B]
    assert A not in ["<a>"]


def test_text_between_two_markers_is_tokenised_in_one_piece() -> None:
    pieces: list[str] = []

    class Recording(EveryCharacter):
        def encode(self, text: str) -> list[int]:
            pieces.append(text)
            return super().encode(text)

    Markup(Recording(TOKENS), TOKENS).encode(["x", "y", A, "", "z", B])
    assert pieces == ["xy", "z"]


@some
@given(st.lists(st.sampled_from([A, B, "x", "<a>", " "])))
def test_decode_undoes_encode_up_to_joined_text(parts: list[Part]) -> None:
    read = MARKUP.decode(MARKUP.encode(parts))
    assert spelled(read) == spelled(parts)
    assert [part for part in read if isinstance(part, Marker)] == [part for part in parts if isinstance(part, Marker)]
    assert not any(isinstance(one, str) and isinstance(two, str) for one, two in pairwise(read))


def test_the_markers_of_a_template() -> None:
    assert marked("x<a><b>y<c>", TOKENS) == ["x", A, B, "y<c>"]


def test_enclosed_wants_the_opening_first() -> None:
    assert enclosed(["\n", A, "x", B, "y"], A, B) == (["x"], ["y"])
    assert enclosed(["z", A, "x", B], A, B) is None
    assert enclosed([A, "x"], A, B) is None
    assert enclosed([], A, B) is None
