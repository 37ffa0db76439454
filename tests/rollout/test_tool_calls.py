"""Tools in ChatML the Hermes way, and what every chat format shares about tool calls."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prl.errors import UserError
from prl.rollout.chatml import END, START, ChatMLRenderer
from prl.rollout.markup import Marker
from prl.rollout.tool_calls import Call, calls_of, take_calls, value_of, written
from prl.types import Message

from tests.plugins.conversations import (
    EveryCharacter,
    Round,
    Speech,
    check_conversation,
    check_garbage,
    check_parse,
    garbage,
    plain_texts,
    some,
    values,
)

TOKENIZER = EveryCharacter((START, END))
RENDERER = ChatMLRenderer(TOKENIZER)
SPEECH = Speech(contents=plain_texts.map(str.rstrip), arguments=st.dictionaries(plain_texts, values, max_size=2))

TOOLS_TEXT = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"type": "function", "function": {"name": "f"}}\n{"name": "g"}\n</tools>\n\n'
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
    'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)


def call(name: str, arguments: str, position: int = 0) -> dict[str, Any]:
    return {"id": f"call_{position}", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_chatml_declares_tools_after_the_system_message() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}, {"name": "g"}]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    rest = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    start = "<|im_start|>system\n"
    assert TOKENIZER.decode(RENDERER.start(messages, tools=tools)) == f"{start}be brief\n\n{TOOLS_TEXT}{rest}"
    assert TOKENIZER.decode(RENDERER.start(messages[1:], tools=tools)) == f"{start}{TOOLS_TEXT}{rest}"


def test_chatml_writes_calls_and_results() -> None:
    messages = [
        {"role": "assistant", "content": "so", "tool_calls": [call("f", '{"x": 1}'), call("g", "{}", 1)]},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": "two"},
    ]
    assert TOKENIZER.decode(RENDERER.start(messages)) == (
        '<|im_start|>assistant\nso\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('so\n<tool_call>{"name": "f"}</tool_call>', {"content": "so", "tool_calls": [call("f", "{}")]}),
        ("<tool_call>f</tool_call>", {"content": "<tool_call>f</tool_call>"}),
        ('<tool_call>{"name": 1}</tool_call>', {"content": '<tool_call>{"name": 1}</tool_call>'}),
        (
            '<tool_call>a<tool_call>{"name": "f"}</tool_call>',
            {"content": "<tool_call>a", "tool_calls": [call("f", "{}")]},
        ),
    ],
)
def test_what_a_policy_said_in_chatml(text: str, message: dict[str, Any]) -> None:
    assert RENDERER.parse(TOKENIZER.encode(text)) == {"role": "assistant", **message}


@some
@given(SPEECH.conversations())
def test_random_conversations_in_chatml(conversation: tuple[list[Message], list[Round]]) -> None:
    check_conversation(RENDERER, *conversation)


@some
@given(SPEECH.turns())
def test_what_was_said_in_chatml_is_read(turn: Message) -> None:
    check_parse(RENDERER, turn)


@some
@given(garbage(2))
def test_anything_sampled_in_chatml_is_a_message(tokens: list[int]) -> None:
    check_garbage(RENDERER, tokens)


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {}, 5),
        ("5", {"type": "string"}, "5"),
        ('{"a": [1.5, null]}', {"type": "object"}, {"a": [1.5, None]}),
        ("five", {"type": "integer"}, "five"),
        ("NaN", {}, "NaN"),
        ("1e999", {}, "1e999"),
        ("[" * 100_000, {}, "[" * 100_000),
        ("", {}, ""),
    ],
)
def test_the_value_of_an_argument_without_quotes(text: str, schema: dict[str, Any], value: Any) -> None:
    assert value_of(text, schema) == value


def test_calls_survive_the_round_trip_and_get_ids() -> None:
    calls = [Call("f", "{}", "mine"), Call("g", '{"x": 1}')]
    message = {"role": "assistant", "tool_calls": written(calls)}
    assert calls_of(message) == [Call("f", "{}", "mine"), Call("g", '{"x": 1}', "call_1")]
    assert calls_of({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "é"}}}]}) == [
        Call("f", '{"x": "é"}')
    ]


def test_a_call_without_a_name_says_so() -> None:
    with pytest.raises(UserError, match="a tool call needs a function with a name, got"):
        calls_of({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]})


def test_attempts_that_are_no_calls_stay_in_place() -> None:
    begin, end = Marker("<"), Marker(">")
    parts = ["a", begin, "no", end, "b", begin, "c", begin, "yes", end, begin, "open"]
    kept, calls = take_calls(parts, begin, end, lambda inner: [Call("f", "{}")] if inner == ["yes"] else None)
    assert kept == ["a", begin, "no", end, "b", begin, "c", begin, "open"]
    assert calls == [Call("f", "{}")]
