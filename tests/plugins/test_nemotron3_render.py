"""The chat format of Nemotron-3: literal strings, random conversations, and the package `renderers`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prl.errors import UserError
from prl.providers import Renderer
from prl_nemotron3.render import SPECIAL_TOKENS, nemotron_3, nemotron_3_ultra

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
THINK, SPEAK = SimpleNamespace(thinking=True), SimpleNamespace(thinking=False)
ULTRA, ULTRA_SPEAKING = nemotron_3_ultra(THINK, TOKENIZER), nemotron_3_ultra(SPEAK, TOKENIZER)
NANO, NANO_SPEAKING = nemotron_3(THINK, TOKENIZER), nemotron_3(SPEAK, TOKENIZER)

others = st.dictionaries(st.sampled_from(["lines", "other"]), values.filter(lambda value: not isinstance(value, str)))
spoken = Speech(
    contents=texts.map(str.rstrip),
    arguments=st.builds(lambda text, others: {**others, "text": text}, texts, others),
)
thought = attrs.evolve(spoken, reasonings=texts.filter(str.strip))
renderers = pytest.mark.parametrize(
    ("renderer", "speech"),
    [(ULTRA, thought), (ULTRA_SPEAKING, spoken), (NANO, thought), (NANO_SPEAKING, spoken)],
    ids=["ultra-thinking", "ultra-speaking", "nano-thinking", "nano-speaking"],
)


def call(name: str, arguments: str, position: int = 0) -> dict[str, Any]:
    return {"id": f"call_{position}", "type": "function", "function": {"name": name, "arguments": arguments}}


def encode(text: str) -> list[int]:
    """What a policy samples when it says `text`, markers included."""
    return OracleTokenizer(TOKENIZER).encode(text)


ANSWERED = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {
        "role": "assistant",
        "content": "let me see",
        "reasoning_content": "look it up",
        "tool_calls": [call("search", '{"query": "a\\nb", "n": [2], "deep": true}'), call("list", "{}", 1)],
    },
    {"role": "tool", "tool_call_id": "call_0", "content": "one"},
    {"role": "tool", "tool_call_id": "call_1", "content": "two"},
    {"role": "assistant", "content": "found", "reasoning_content": "done"},
    {"role": "user", "content": "thanks"},
]
CALLS_TEXT = (
    "\n<tool_call>\n<function=search>\n<parameter=query>\na\nb\n</parameter>\n<parameter=n>\n[2]\n</parameter>\n"
    "<parameter=deep>\nTrue\n</parameter>\n</function>\n</tool_call>\n"
    "<tool_call>\n<function=list>\n</function>\n</tool_call>\n<|im_end|>"
)
PROMPT_TEXT = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n"
RESULTS_TEXT = (
    "<|im_start|>user\n<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response>\n<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n"
)
THANKS_TEXT = "<|im_start|>user\nthanks<|im_end|>\n<|im_start|>assistant\n<think>\n"


def test_a_conversation_with_ultra() -> None:
    assert TOKENIZER.decode(ULTRA.start(ANSWERED)) == (
        f"{PROMPT_TEXT}look it up</think>let me see{CALLS_TEXT}\n"
        f"{RESULTS_TEXT}done</think>found<|im_end|>\n{THANKS_TEXT}"
    )


def test_a_conversation_with_nano_and_super() -> None:
    assert TOKENIZER.decode(NANO.start(ANSWERED)) == (
        f"{PROMPT_TEXT}look it up\n</think>\nlet me see{CALLS_TEXT}\n"
        f"{RESULTS_TEXT}done\n</think>\nfound<|im_end|>\n{THANKS_TEXT}"
    )


def test_what_the_assistant_says_includes_the_end() -> None:
    tokens, said = ULTRA.demonstration(ANSWERED[:-1])
    spans = "".join(TOKENIZER.decode([t]) if s else "\0" for t, s in zip(tokens, said, strict=True)).split("\0")
    assert [span for span in spans if span] == [
        f"look it up</think>let me see{CALLS_TEXT}",
        "done</think>found<|im_end|>",
    ]
    assert TOKENIZER.decode(tokens).endswith("found<|im_end|>")


@pytest.mark.parametrize(("renderer", "invitation"), [(ULTRA, "<think>\n"), (NANO_SPEAKING, "<think></think>")])
def test_the_prompt_has_a_system_message_even_if_empty(renderer: Renderer, invitation: str) -> None:
    assert TOKENIZER.decode(renderer.start([{"role": "user", "content": "hi"}])) == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n" + invitation
    )


def test_an_extension_ends_the_turn_unless_it_stopped() -> None:
    thanks = [{"role": "user", "content": "thanks"}]
    assert TOKENIZER.decode(ULTRA.extend(thanks, stopped=True)) == "\n" + THANKS_TEXT
    assert TOKENIZER.decode(ULTRA.extend(thanks, stopped=False)) == "<|im_end|>\n" + THANKS_TEXT
    assert ULTRA.stop_tokens == (TOKENIZER.special("<|im_end|>"),)


def test_tools_are_declared_after_the_system_message() -> None:
    tokens = ULTRA.start([{"role": "system", "content": "be brief"}], tools=TOOLS)
    text = TOKENIZER.decode(tokens)
    assert text.startswith(
        "<|im_start|>system\nbe brief\n\n# Tools\n\nYou have access to the following functions:\n\n<tools>\n"
        "<function>\n<name>write_file</name>\n<description>Write a file.\nReplaces it.</description>\n<parameters>\n"
        "<parameter>\n<name>text</name>\n<type>string</type>\n<description>What to write.</description>\n"
        "<maxLength>9</maxLength>\n</parameter>\n"
        '<parameter>\n<name>mode</name>\n<type>string</type>\n<enum>["a", "w"]</enum>\n<default>w</default>\n'
        "</parameter>\n<parameter>\n<name>lines</name>\n<type>array</type>\n"
        '<items>{"type": "integer", "minimum": 1}</items>\n</parameter>\n<required>["text"]</required>\n</parameters>\n'
        "</function>\n<function>\n<name>list-files</name>\n<parameters>\n"
        "<parameter>\n<name>text</name>\n<type>string</type>\n</parameter>\n</parameters>\n</function>\n"
        "</tools>\n\nIf you choose to call a function ONLY reply in the following format with NO suffix:\n\n"
        "<tool_call>\n<function=example_function_name>\n"
    )
    assert text.endswith("\n</IMPORTANT><|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert tokens.count(TOKENIZER.special("<tool_call>")) == 2


@pytest.mark.parametrize(
    ("speech", "message"),
    [
        ("4<|im_end|>", {"reasoning_content": "4", "content": ""}),
        ("sum</think>4\n<|im_end|>", {"reasoning_content": "sum", "content": "4"}),
        (
            "</think>so\n<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>\n",
            {"content": "so", "tool_calls": [call("f", '{"x": 1}')]},
        ),
        (
            "</think><tool_call><function=f><parameter=x>None</parameter></function></tool_call>",
            {"content": "", "tool_calls": [call("f", '{"x": null}')]},
        ),
        (
            "hm<tool_call>\n<function=f>\n</function>\n</tool_call>",
            {"reasoning_content": "hm", "content": "", "tool_calls": [call("f", "{}")]},
        ),
        ("</think><tool_call>f</tool_call>", {"content": "<tool_call>f</tool_call>"}),
        (
            "</think><tool_call><function=f><parameter=x>1</function></tool_call>",
            {"content": "<tool_call><function=f><parameter=x>1</function></tool_call>"},
        ),
        ("</think>a<tool_call><function=f></function>", {"content": "a<tool_call><function=f></function>"}),
    ],
)
def test_what_a_policy_said(speech: str, message: dict[str, Any]) -> None:
    assert ULTRA.parse(encode(speech)) == {"role": "assistant", **message}


@pytest.mark.parametrize(
    ("speech", "message"),
    [
        ("sum\n</think>\n4<|im_end|>", {"reasoning_content": "sum", "content": "4"}),
        ("sum</think>4<|im_end|>", {"reasoning_content": "sum", "content": "4"}),
        ("\n</think>\n4<|im_end|>", {"content": "4"}),
        ("</think>4<|im_end|>", {"content": "4"}),
    ],
)
def test_what_nano_said(speech: str, message: dict[str, Any]) -> None:
    assert NANO.parse(encode(speech)) == {"role": "assistant", **message}


def test_declared_types_tell_text_from_values() -> None:
    speech = encode("</think><tool_call><function=write_file><parameter=text>True</parameter></function></tool_call>")
    assert ULTRA.parse(speech)["tool_calls"] == [call("write_file", '{"text": true}')]
    assert ULTRA.parse(speech, tools=TOOLS)["tool_calls"] == [call("write_file", '{"text": "True"}')]


def test_what_cannot_be_rendered_says_why() -> None:
    with pytest.raises(UserError, match="a message has the role 'critic'; this chat format knows assistant, system"):
        ULTRA.start([{"role": "critic", "content": "bad"}])
    with pytest.raises(UserError, match=r"the arguments of the call of 'f' are no JSON object: '\[\]'"):
        ULTRA.start([{"role": "assistant", "tool_calls": [call("f", "[]")]}])


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
    check_garbage(ULTRA, tokens)


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_markers_in_a_message_are_text(role: str) -> None:
    check_forgery(ULTRA, {"role": role}, len(SPECIAL_TOKENS))


# --- against the package `renderers` ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def oracles() -> list[Any]:
    """Its renderers with history kept, in the order ultra, ultra speaking, nano, nano speaking."""
    why = "the oracle is the PyPI package renderers, which is not installed"
    module = pytest.importorskip("renderers.nemotron3", reason=why)
    configs = pytest.importorskip("renderers.configs", reason=why)
    tokenizer = OracleTokenizer(TOKENIZER)
    return [
        renderer(tokenizer, config(truncate_history_thinking=False, enable_thinking=thinking))
        for renderer, config in [
            (module.Nemotron3UltraRenderer, configs.Nemotron3UltraRendererConfig),
            (module.Nemotron3Renderer, configs.Nemotron3RendererConfig),
        ]
        for thinking in (True, False)
    ]


unreasoned = Speech(
    contents=plain_texts,
    arguments=st.builds(lambda text, others: {**others, "text": text}, plain_texts, others),
)
reasoned = attrs.evolve(unreasoned, reasonings=plain_texts.filter(str.strip))
"""Without forged markers, of which the oracle makes special tokens."""


@pytest.mark.parametrize(
    ("index", "renderer", "speech"),
    [(0, ULTRA, reasoned), (1, ULTRA_SPEAKING, unreasoned), (2, NANO, reasoned), (3, NANO_SPEAKING, unreasoned)],
    ids=["ultra-thinking", "ultra-speaking", "nano-thinking", "nano-speaking"],
)
@some
@given(data=st.data())
def test_the_same_tokens_as_the_oracle(
    index: int, renderer: Renderer, speech: Speech, oracles: list[Any], data: st.DataObject
) -> None:
    """While thinking every turn reasons: what the template writes for one that does not is not what was sampled."""
    messages = messages_of(*data.draw(speech.conversations(plain_texts)))
    expected = oracles[index].render_ids(messages, tools=list(TOOLS), add_generation_prompt=True)
    assert renderer.start(messages, tools=TOOLS) == expected


@some
@given(turn=reasoned.turns())
def test_the_same_calls_are_read(oracles: list[Any], turn: Any) -> None:
    speech = [t for t, said in zip(*ULTRA.demonstration([turn]), strict=True) if said]
    read = oracles[0].parse_response(speech, prompt_ids=encode("<|im_start|>assistant\n<think>\n"), tools=list(TOOLS))
    assert read.reasoning_content == turn["reasoning_content"].strip()
    names = [call["function"]["name"] for call in turn.get("tool_calls", ())]
    assert [call.name for call in read.tool_calls] == names
