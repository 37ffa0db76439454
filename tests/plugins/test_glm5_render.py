"""The chat format of GLM-5, 5.1 and 5.2: literal strings, random conversations, and the package `renderers`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prl.errors import UserError
from prl.providers import Renderer
from prl_glm5.render import SPECIAL_TOKENS, glm_5, glm_5_1, glm_5_2

from tests.plugins.conversations import (
    TOOLS,
    EveryCharacter,
    OracleTokenizer,
    Speech,
    check_conversation,
    check_forgery,
    check_garbage,
    check_parse,
    garbage,
    messages_of,
    plain_texts,
    some,
    texts,
    values,
)

TOKENIZER = EveryCharacter(SPECIAL_TOKENS)
BUILD = {"5": glm_5, "5.1": glm_5_1, "5.2": glm_5_2}
RENDERERS = {
    (release, thinking): build(SimpleNamespace(thinking=thinking), TOKENIZER)
    for release, build in BUILD.items()
    for thinking in (True, False)
}
THINKING = RENDERERS["5.1", True]

arguments = st.dictionaries(st.sampled_from(["lines", "other"]), values.filter(lambda v: not isinstance(v, str)))
spoken = Speech(
    contents=texts.map(str.strip),
    arguments=st.builds(lambda text, others: {**others, "text": text}, texts, arguments),
)
thought = attrs.evolve(spoken, reasonings=texts.map(str.strip))
renderers = pytest.mark.parametrize(
    ("renderer", "speech"),
    [(renderer, thought if thinking else spoken) for (_, thinking), renderer in RENDERERS.items()],
    ids=[f"{release}-{'thinking' if thinking else 'speaking'}" for release, thinking in RENDERERS],
)

CALL = {"id": "call_0", "type": "function", "function": {"name": "search", "arguments": '{"query": "a b", "n": 2}'}}
ASKED = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
ANSWERED = [
    *ASKED,
    {"role": "assistant", "content": "let me see", "reasoning_content": "look it up", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_0", "content": "one"},
    {"role": "tool", "tool_call_id": "call_1", "content": "two"},
    {"role": "assistant", "content": "found", "reasoning_content": "done"},
    {"role": "user", "content": "thanks"},
]
ANSWERED_TEXT = (
    "[gMASK]<sop><|system|>be brief<|user|>hi<|assistant|><think>look it up</think>let me see"
    "<tool_call>search<arg_key>query</arg_key><arg_value>a b</arg_value>"
    "<arg_key>n</arg_key><arg_value>2</arg_value></tool_call>"
    "<|observation|><tool_response>one</tool_response><tool_response>two</tool_response>"
    "<|assistant|><think>done</think>found<|user|>thanks<|assistant|><think>"
)


def encode(text: str) -> list[int]:
    """What a policy samples when it says `text`, markers included."""
    return OracleTokenizer(TOKENIZER).encode(text)


def test_a_conversation_with_tools_and_reasoning() -> None:
    assert TOKENIZER.decode(THINKING.start(ANSWERED)) == ANSWERED_TEXT


def test_what_the_assistant_says_includes_the_marker_of_who_is_next() -> None:
    tokens, said = THINKING.demonstration(ANSWERED[:-1])
    spans = "".join(TOKENIZER.decode([t]) if s else "\0" for t, s in zip(tokens, said, strict=True)).split("\0")
    assert [span for span in spans if span] == [
        "look it up</think>let me see<tool_call>search<arg_key>query</arg_key><arg_value>a b</arg_value>"
        "<arg_key>n</arg_key><arg_value>2</arg_value></tool_call><|observation|>",
        "done</think>found<|user|>",
    ]


@pytest.mark.parametrize(
    ("release", "thinking", "prompt"),
    [
        ("5", True, "[gMASK]<sop><|user|>hi<|assistant|><think>"),
        ("5", False, "[gMASK]<sop><|user|>hi<|assistant|></think>"),
        ("5.1", True, "[gMASK]<sop><|user|>hi<|assistant|><think>"),
        ("5.1", False, "[gMASK]<sop><|user|>hi<|assistant|></think>"),
        ("5.2", True, "[gMASK]<sop><|system|>Reasoning Effort: Max<|user|>hi<|assistant|><think>"),
        ("5.2", False, "[gMASK]<sop><|user|>hi<|assistant|><think></think>"),
    ],
)
def test_the_prompts_of_the_releases(release: str, thinking: bool, prompt: str) -> None:
    renderer = RENDERERS[release, thinking]
    assert TOKENIZER.decode(renderer.start([{"role": "user", "content": "hi"}])) == prompt


@pytest.mark.parametrize(
    ("release", "declaration"),
    [
        ("5", '{"type": "function", "function": {"name": "f", "strict": true}}'),
        ("5.1", '{"name": "f"}'),
        ("5.2", '{"name": "f"}'),
    ],
)
def test_the_declaration_of_tools(release: str, declaration: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "strict": True}}
    tokens = RENDERERS[release, False].start([{"role": "user", "content": "hi"}], tools=[tool])
    assert TOKENIZER.decode(tokens).startswith(
        "[gMASK]<sop><|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        f"{declaration}\n</tools>\n\n"
        "For each function call, output the function name and arguments within the following XML format:\n"
        "<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>{arg-value-1}</arg_value>"
        "<arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>...</tool_call><|user|>hi<|assistant|>"
    )
    assert tokens.count(TOKENIZER.special("<arg_key>")) == 2


def test_the_sampled_marker_opens_the_next_message() -> None:
    tool = {"role": "tool", "tool_call_id": "call_0", "content": "4"}
    user = {"role": "user", "content": "why?"}
    after_call = "<tool_response>4</tool_response><|assistant|><think>"
    assert TOKENIZER.decode(THINKING.extend([tool], stopped=True)) == after_call
    assert TOKENIZER.decode(THINKING.extend([tool], stopped=False)) == "<|observation|>" + after_call
    assert TOKENIZER.decode(THINKING.extend([user], stopped=True)) == "why?<|assistant|><think>"
    assert TOKENIZER.decode(THINKING.extend([user], stopped=False)) == "<|user|>why?<|assistant|><think>"
    both = THINKING.extend([tool, user], stopped=True)
    assert TOKENIZER.decode(both) == "<tool_response>4</tool_response><|user|>why?<|assistant|><think>"


def test_a_system_message_after_a_turn_brings_its_own_marker() -> None:
    extension = THINKING.extend([{"role": "system", "content": "stop"}], stopped=True)
    assert TOKENIZER.decode(extension) == "<|system|>stop<|assistant|><think>"


def test_the_policy_stops_where_somebody_else_speaks() -> None:
    assert [TOKENIZER.decode([stop]) for stop in THINKING.stop_tokens] == [
        "<|user|>",
        "<|observation|>",
        "<|endoftext|>",
    ]


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": "call_0", "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("speech", "message"),
    [
        ("4<|user|>", {"reasoning_content": "4", "content": ""}),
        ("sum</think>4<|user|>", {"reasoning_content": "sum", "content": "4"}),
        ("</think>4<|endoftext|>", {"content": "4"}),
        (
            "</think>so<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call><|observation|>",
            {"content": "so", "tool_calls": [call("f", '{"x": 1}')]},
        ),
        ("</think><tool_call>f</tool_call>", {"content": "", "tool_calls": [call("f", "{}")]}),
        (
            "hm<tool_call>f</tool_call>",
            {"reasoning_content": "hm", "content": "", "tool_calls": [call("f", "{}")]},
        ),
        ("</think><tool_call>f<arg_key>x</tool_call>", {"content": "<tool_call>f<arg_key>x</tool_call>"}),
        ("</think><tool_call>two words</tool_call>", {"content": "<tool_call>two words</tool_call>"}),
        ("</think><tool_call></tool_call>", {"content": "<tool_call></tool_call>"}),
        ("</think>a<tool_call>f", {"content": "a<tool_call>f"}),
        (
            "</think><tool_call>f<tool_call>g</tool_call>",
            {"content": "<tool_call>f", "tool_calls": [call("g", "{}")]},
        ),
    ],
)
def test_what_a_policy_said(speech: str, message: dict[str, Any]) -> None:
    assert THINKING.parse(encode(speech)) == {"role": "assistant", **message}


def test_declared_types_tell_text_from_numbers() -> None:
    speech = encode("</think><tool_call>write_file<arg_key>text</arg_key><arg_value>12</arg_value></tool_call>")
    assert THINKING.parse(speech)["tool_calls"] == [call("write_file", '{"text": 12}')]
    assert THINKING.parse(speech, tools=TOOLS)["tool_calls"] == [call("write_file", '{"text": "12"}')]


def test_what_cannot_be_rendered_says_why() -> None:
    with pytest.raises(UserError, match="a message has the role 'critic'; this chat format knows assistant, system"):
        THINKING.start([{"role": "critic", "content": "bad"}])
    with pytest.raises(UserError, match="the arguments of the call of 'f' are no JSON object: '3'"):
        THINKING.demonstration([{"role": "assistant", "tool_calls": [call("f", "3")]}])
    with pytest.raises(UserError, match=r"a tool needs a function with a name, got \{'type': 'function'\}"):
        THINKING.start([{"role": "user", "content": "hi"}], tools=[{"type": "function"}])


@renderers
@some
@given(data=st.data())
def test_random_conversations(renderer: Renderer, speech: Speech, data: st.DataObject) -> None:
    check_conversation(renderer, *data.draw(speech.conversations()))


@renderers
@some
@given(data=st.data())
def test_what_was_said_is_read(renderer: Renderer, speech: Speech, data: st.DataObject) -> None:
    check_parse(renderer, data.draw(speech.turns()))


@some
@given(tokens=garbage(len(SPECIAL_TOKENS)))
def test_anything_sampled_is_a_message(tokens: list[int]) -> None:
    check_garbage(THINKING, tokens)


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_markers_in_a_message_are_text(role: str) -> None:
    check_forgery(THINKING, {"role": role}, len(SPECIAL_TOKENS))


# --- against the package `renderers` ----------------------------------------------------------------------------------
Oracles = dict[tuple[str, bool], Any]


@pytest.fixture(scope="module")
def oracles() -> Oracles:
    """Its GLM renderers with history kept; it has no 5.2, but 5.3 at the highest effort writes the same."""
    glm = pytest.importorskip(
        "renderers.glm5", reason="the oracle is the PyPI package renderers, which is not installed"
    )
    configs = pytest.importorskip("renderers.configs", reason="the oracle is the PyPI package renderers")
    tokenizer = OracleTokenizer(TOKENIZER)
    kept: Oracles = {
        (release, thinking): renderer(tokenizer, config(clear_thinking=False, enable_thinking=thinking))
        for thinking in (True, False)
        for release, renderer, config in [
            ("5", glm.GLM5Renderer, configs.GLM5RendererConfig),
            ("5.1", glm.GLM51Renderer, configs.GLM51RendererConfig),
        ]
    }
    kept["5.2", True] = glm.GLM53Renderer(tokenizer, configs.GLM53RendererConfig(clear_thinking=False))
    return kept


unreasoned = Speech(
    contents=plain_texts.map(str.strip),
    arguments=st.builds(lambda text, others: {**others, "text": text}, plain_texts, arguments),
)
mixed = attrs.evolve(unreasoned, reasonings=plain_texts)
reasoned = attrs.evolve(unreasoned, reasonings=plain_texts.map(str.strip).filter(bool))
"""Without forged markers, of which the oracle makes special tokens."""


@pytest.mark.parametrize(("release", "oracle_speech"), [("5", reasoned), ("5.1", reasoned), ("5.2", mixed)])
@some
@given(data=st.data())
def test_the_same_tokens_as_the_oracle(release: str, oracle_speech: Speech, oracles: Oracles, data: Any) -> None:
    """Up to 5.1 every turn reasons: how the template writes one that does not depends on where it stands."""
    messages = messages_of(*data.draw(oracle_speech.conversations(plain_texts)))
    expected = oracles[release, True].render_ids(messages, tools=list(TOOLS), add_generation_prompt=True)
    assert RENDERERS[release, True].start(messages, tools=TOOLS) == expected


@pytest.mark.parametrize("release", ["5", "5.1"])
@some
@given(conversation=unreasoned.conversations(plain_texts))
def test_the_same_tokens_without_thinking(release: str, oracles: Oracles, conversation: Any) -> None:
    messages = messages_of(*conversation)
    expected = oracles[release, False].render_ids(messages, tools=list(TOOLS), add_generation_prompt=True)
    assert RENDERERS[release, False].start(messages, tools=TOOLS) == expected


@some
@given(conversation=reasoned.conversations(plain_texts))
def test_the_same_tokens_are_said(oracles: Oracles, conversation: Any) -> None:
    opening, rounds = conversation
    messages = messages_of(opening, rounds)
    expected = oracles["5.1", True].render(messages)
    assert THINKING.demonstration(messages) == (expected.token_ids, expected.sampled_mask)


@some
@given(turn=reasoned.turns())
def test_the_same_calls_are_read(oracles: Oracles, turn: Any) -> None:
    speech = [t for t, said in zip(*THINKING.demonstration([turn]), strict=True) if said]
    read = oracles["5.1", True].parse_response(speech, tools=list(TOOLS))
    assert read.reasoning_content == turn["reasoning_content"]
    names = [call["function"]["name"] for call in turn.get("tool_calls", ())]
    assert [call.name for call in read.tool_calls] == names
