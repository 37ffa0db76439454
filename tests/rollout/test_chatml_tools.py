"""ChatML with tools on random conversations, and against the package `renderers`, whose Qwen3 speaks it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prl.rollout.chatml import ChatMLRenderer
from prl.types import Message

from tests.plugins.conversations import (
    TOOLS,
    EveryCharacter,
    OracleTokenizer,
    Round,
    Speech,
    check_conversation,
    check_garbage,
    check_parse,
    garbage,
    messages_of,
    plain_texts,
    some,
    values,
)

SPECIALS = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
)
RENDERER = ChatMLRenderer(EveryCharacter(SPECIALS[:3]))
arguments = st.dictionaries(st.sampled_from(["text", "mode"]), values, max_size=2)
speech = Speech(contents=plain_texts.map(str.strip), arguments=arguments)


@some
@given(speech.conversations())
def test_held_in_turns_it_equals_the_whole(conversation: tuple[list[Message], list[Round]]) -> None:
    check_conversation(RENDERER, *conversation)


@some
@given(speech.turns())
def test_what_was_said_is_read(turn: Message) -> None:
    check_parse(RENDERER, turn)


@some
@given(garbage(3))
def test_whatever_is_sampled_is_a_message(tokens: list[int]) -> None:
    check_garbage(RENDERER, tokens)


@pytest.fixture(scope="module")
def oracle() -> Any:
    why = "the oracle is the PyPI package renderers, which is not installed"
    module = pytest.importorskip("renderers.qwen3", reason=why)
    configs = pytest.importorskip("renderers.configs", reason=why)
    return module.Qwen3Renderer(OracleTokenizer(EveryCharacter(SPECIALS)), configs.Qwen3RendererConfig())


def as_text(tokens: list[int], specials: tuple[str, ...]) -> str:
    """The oracle knows more markers as tokens, which ChatML here writes as text."""
    return EveryCharacter(specials).decode(tokens)


@some
@given(conversation=speech.conversations(plain_texts))
def test_the_same_tokens_as_the_oracle(oracle: Any, conversation: tuple[list[Message], list[Round]]) -> None:
    messages = messages_of(*conversation)
    expected = oracle.render_ids(messages, tools=list(TOOLS), add_generation_prompt=True)
    own = RENDERER.start(messages, tools=TOOLS)
    assert as_text(own, SPECIALS[:3]) == as_text(expected, SPECIALS)
