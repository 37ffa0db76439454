"""The chat format of Kimi-K2, K2.5 and K2.7: literal strings, random conversations, and the package `renderers`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prl.errors import UserError
from prl.providers import Renderer
from prl_kimi_k2.declare import typescript
from prl_kimi_k2.render import SPECIAL_TOKENS, kimi_k2, kimi_k2_5, kimi_k2_7

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

MEDIA = ("<|media_begin|>", "<|media_content|>", "<|media_pad|>", "<|media_end|>")
TOKENIZER = EveryCharacter((*SPECIAL_TOKENS, *MEDIA))
K2 = kimi_k2(None, TOKENIZER)
K2_5 = kimi_k2_5(SimpleNamespace(thinking=False), TOKENIZER)
K2_7 = kimi_k2_7(None, TOKENIZER)

NATIVE_ID = "functions.{name}:{position}"
spoken = Speech(contents=texts, arguments=st.dictionaries(plain_texts, values, max_size=2), ids=NATIVE_ID)
thought = attrs.evolve(spoken, reasonings=texts)
renderers = pytest.mark.parametrize(
    ("renderer", "speech"), [(K2, spoken), (K2_5, spoken), (K2_7, thought)], ids=["k2", "k2.5-speaking", "k2.7"]
)


def call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


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
        "tool_calls": [call("functions.search:0", "search", '{"n": 2}'), call("functions.list:1", "list", "{}")],
    },
    {"role": "tool", "tool_call_id": "functions.search:0", "content": "one"},
    {"role": "tool", "tool_call_id": "functions.list:1", "name": "list", "content": "two"},
    {"role": "assistant", "content": "found", "reasoning_content": "done"},
    {"role": "user", "content": "thanks"},
]
PROMPT_TEXT = "<|im_system|>system<|im_middle|>be brief<|im_end|><|im_user|>user<|im_middle|>hi<|im_end|>"
CALLS_TEXT = (
    "let me see<|tool_calls_section_begin|>"
    '<|tool_call_begin|>functions.search:0<|tool_call_argument_begin|>{"n": 2}<|tool_call_end|>'
    "<|tool_call_begin|>functions.list:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
    "<|tool_calls_section_end|><|im_end|>"
)
RESULTS_TEXT = (
    "<|im_system|>tool<|im_middle|>## Return of functions.search:0\none<|im_end|>"
    "<|im_system|>list<|im_middle|>## Return of functions.list:1\ntwo<|im_end|>"
)
INVITATION = "<|im_assistant|>assistant<|im_middle|>"


def test_a_conversation_with_tools_and_reasoning() -> None:
    assert TOKENIZER.decode(K2_7.start(ANSWERED)) == (
        f"{PROMPT_TEXT}{INVITATION}<think>look it up</think>{CALLS_TEXT}{RESULTS_TEXT}"
        f"{INVITATION}<think>done</think>found<|im_end|><|im_user|>user<|im_middle|>thanks<|im_end|>{INVITATION}<think>"
    )


def test_k2_does_not_reason() -> None:
    assert TOKENIZER.decode(K2.start(ANSWERED)) == (
        f"{PROMPT_TEXT}{INVITATION}{CALLS_TEXT}{RESULTS_TEXT}"
        f"{INVITATION}found<|im_end|><|im_user|>user<|im_middle|>thanks<|im_end|>{INVITATION}"
    )


def test_what_the_assistant_says_includes_the_end() -> None:
    tokens, said = K2_7.demonstration(ANSWERED[:-1])
    spans = "".join(TOKENIZER.decode([t]) if s else "\0" for t, s in zip(tokens, said, strict=True)).split("\0")
    assert [span for span in spans if span] == [f"look it up</think>{CALLS_TEXT}", "done</think>found<|im_end|>"]
    assert TOKENIZER.decode(tokens).endswith("found<|im_end|>")


def test_the_prompts_of_the_releases() -> None:
    hi = [{"role": "user", "content": "hi"}]
    said = "<|im_user|>user<|im_middle|>hi<|im_end|><|im_assistant|>assistant<|im_middle|>"
    introduction = "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>\n"
    assert TOKENIZER.decode(K2.start(hi)) == introduction + said
    assert TOKENIZER.decode(K2_5.start(hi)) == said + "<think></think>"
    assert TOKENIZER.decode(K2_7.start(hi)) == said + "<think>"


def test_an_extension_ends_the_turn_unless_it_stopped() -> None:
    thanks = [{"role": "user", "content": "thanks"}]
    extension = "<|im_user|>user<|im_middle|>thanks<|im_end|><|im_assistant|>assistant<|im_middle|><think>"
    assert TOKENIZER.decode(K2_7.extend(thanks, stopped=True)) == extension
    assert TOKENIZER.decode(K2_7.extend(thanks, stopped=False)) == "<|im_end|>" + extension
    assert K2_7.stop_tokens == (TOKENIZER.special("<|im_end|>"),)


def test_tools_are_declared_as_json_by_k2() -> None:
    tokens = K2.start([{"role": "system", "content": ""}], tools=[{"type": "function", "function": {"name": "é"}}])
    assert TOKENIZER.decode(tokens).startswith(
        '<|im_system|>tool_declare<|im_middle|>[{"function":{"name":"é"},"type":"function"}]<|im_end|><|im_system|>system'
    )


def test_tools_are_declared_as_types_by_k2_5_and_later() -> None:
    declaration = (
        "# Tools\n\n## functions\nnamespace functions {\n"
        "// Write a file.\n// Replaces it.\n"
        "type write_file = (_: {\n"
        "  //  What to write. \n  // maxLength: 9\n  text: string,\n"
        "  lines?: Array<\n    // minimum: 1\n    number\n  >,\n"
        '  // Default: "w"\n  mode?: "a" | "w"\n'
        "}) => any;\n"
        "type list-files = (_: {\n  text?: string\n}) => any;\n}\n"
    )
    assert typescript(TOOLS) == declaration
    expected = f"<|im_system|>tool_declare<|im_middle|>{declaration}<|im_end|><|im_user|>"
    assert TOKENIZER.decode(K2_7.start([{"role": "user", "content": "hi"}], tools=TOOLS)).startswith(expected)


TREE = {"type": "object", "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#"}}}


def test_a_type_that_refers_to_itself() -> None:
    assert typescript([{"name": "f", "parameters": TREE}]) == (
        "# Tools\n\n## functions\nnamespace functions {\ninterface parameters {\n"
        "  left?: parameters,\n  right?: parameters\n}\ntype f = (_: parameters) => any;\n}\n"
    )


def test_ids_of_another_form_are_replaced_with_what_names_the_function() -> None:
    foreign = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call("call_7", "f", "{}"), call("f:9", "f", "{}")]},
        {"role": "tool", "tool_call_id": "call_7", "content": "one"},
        {"role": "tool", "tool_call_id": "f:9", "content": "two"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "three"},
    ]
    text = TOKENIZER.decode(K2.start(foreign))
    assert text.split("<|tool_call_begin|>")[1].startswith("functions.f:0<|tool_call_argument_begin|>{}")
    assert text.split("<|tool_call_begin|>")[2].startswith("f:9<|tool_call_argument_begin|>{}")
    assert text.split("<|tool_call_begin|>")[3].startswith('functions.g:2<|tool_call_argument_begin|>{"x": 1}')
    results = text.split("## Return of ")[1:]
    assert [result.split("<|im_end|>")[0] for result in results] == [
        "functions.f:0\none",
        "f:9\ntwo",
        "functions.g:2\nthree",
    ]


SECTION = "<|tool_calls_section_begin|>{}<|tool_calls_section_end|>"
SEARCH = "<|tool_call_begin|>functions.search:3<|tool_call_argument_begin|>{}<|tool_call_end|>"


@pytest.mark.parametrize(
    ("speech", "message"),
    [
        ("4<|im_end|>", {"reasoning_content": "4", "content": ""}),
        ("sum</think>4<|im_end|>", {"reasoning_content": "sum", "content": "4"}),
        (
            "</think>so" + SECTION.format(SEARCH.format('{"x": 1}')),
            {"content": "so", "tool_calls": [call("functions.search:3", "search", '{"x": 1}')]},
        ),
        (
            "hm" + SECTION.format(SEARCH.format("{}")),
            {"reasoning_content": "hm", "content": "", "tool_calls": [call("functions.search:3", "search", "{}")]},
        ),
        (
            "draft" + SECTION.format(SEARCH.format("{}")) + "</think>no",
            {"reasoning_content": "draft" + SECTION.format(SEARCH.format("{}")), "content": "no"},
        ),
        ("</think>" + SECTION.format(""), {"content": SECTION.format("")}),
        ("</think>" + SECTION.format(SEARCH.format("[1]")), {"content": SECTION.format(SEARCH.format("[1]"))}),
        (
            "</think>" + SECTION.format(SEARCH.format('{"x": NaN}')),
            {"content": SECTION.format(SEARCH.format('{"x": NaN}'))},
        ),
        (
            "</think>" + SECTION.format("<|tool_call_begin|>search<|tool_call_argument_begin|>{}<|tool_call_end|>"),
            {"content": SECTION.format("<|tool_call_begin|>search<|tool_call_argument_begin|>{}<|tool_call_end|>")},
        ),
        ("</think>" + SEARCH.format("{}"), {"content": SEARCH.format("{}")}),
    ],
)
def test_what_a_policy_said(speech: str, message: dict[str, Any]) -> None:
    assert K2_7.parse(encode(speech)) == {"role": "assistant", **message}


def test_what_cannot_be_rendered_says_why() -> None:
    with pytest.raises(UserError, match="a message has the role 'critic'; this chat format knows assistant, system"):
        K2_7.start([{"role": "critic", "content": "bad"}])
    with pytest.raises(UserError, match="a tool call needs a function with a name, got"):
        K2_7.start([{"role": "assistant", "tool_calls": [{"id": "1"}]}])
    odd = {"name": "f", "parameters": {"properties": {"x": {"oneOf": []}}}}
    with pytest.raises(UserError, match=r"tool 'f': no type in the schema \{'oneOf': \[\]\}"):
        K2_7.start([{"role": "user", "content": "hi"}], tools=[odd])


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
    check_garbage(K2_7, tokens)


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_markers_in_a_message_are_text(role: str) -> None:
    check_forgery(K2_7, {"role": role}, len(TOKENIZER.specials))


# --- against the package `renderers` ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def oracles() -> dict[str, Any]:
    """Its Kimi renderers; K2.7 keeps reasoning, so every turn is rendered as K2.5 renders the latest ones."""
    why = "the oracle is the PyPI package renderers, which is not installed"
    k2 = pytest.importorskip("renderers.kimi_k2", reason=why)
    k25 = pytest.importorskip("renderers.kimi_k25", reason=why)
    configs = pytest.importorskip("renderers.configs", reason=why)

    class Preserving(k25.KimiK25Renderer):  # type: ignore[name-defined, misc]
        def _render_assistant_body(self, *args: Any, is_suffix: bool, **kwargs: Any) -> None:
            super()._render_assistant_body(*args, is_suffix=True, **kwargs)

    tokenizer = OracleTokenizer(TOKENIZER)
    return {
        "k2": k2.KimiK2Renderer(tokenizer),
        "k2.5": Preserving(tokenizer, configs.KimiK25RendererConfig(thinking=False)),
        "k2.7": Preserving(tokenizer),
        "typescript": k25._encode_tools_typescript,
    }


harmless = attrs.evolve(spoken, contents=plain_texts, reasonings=plain_texts)
"""Without forged markers, of which the oracle makes special tokens."""


@pytest.mark.parametrize(("release", "renderer"), [("k2", K2), ("k2.5", K2_5), ("k2.7", K2_7)])
@some
@given(conversation=harmless.conversations(plain_texts))
def test_the_same_tokens_as_the_oracle(
    release: str, renderer: Renderer, oracles: dict[str, Any], conversation: Any
) -> None:
    messages = messages_of(*conversation)
    expected = oracles[release].render_ids(messages, tools=list(TOOLS), add_generation_prompt=True)
    assert renderer.start(messages, tools=TOOLS) == expected


@some
@given(turn=harmless.turns())
def test_the_same_calls_are_read(oracles: dict[str, Any], turn: Any) -> None:
    speech = [t for t, said in zip(*K2_7.demonstration([turn]), strict=True) if said]
    read = oracles["k2.7"].parse_response(speech, prompt_ids=encode(INVITATION + "<think>"))
    mine = K2_7.parse(speech)
    assert read.content == mine["content"].strip()
    assert (read.reasoning_content or "") == mine.get("reasoning_content", "").strip()
    assert [call.id for call in read.tool_calls] == [call["id"] for call in mine.get("tool_calls", ())]


descriptions = st.fixed_dictionaries({}, optional={"description": st.sampled_from(["", "one", "two\n\nlines"])})


def schema(fields: dict[str, st.SearchStrategy[Any]], optional: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    told = st.fixed_dictionaries(fields, optional=optional)
    return st.builds(lambda one, other: {**one, **other}, told, descriptions)


sizes = st.integers(0, 9)
leaves = (
    schema({"type": st.just("string")}, {"maxLength": sizes, "minLength": sizes, "pattern": st.just("a+")})
    | schema({"type": st.sampled_from(["number", "integer"])}, {"maximum": sizes, "minimum": sizes, "default": sizes})
    | schema({"type": st.sampled_from(["boolean", "null", "any"])}, {})
    | schema({"enum": st.just(["a", 1, None])}, {"type": st.just("string"), "minLength": sizes})
    | schema({"type": st.just(["string", "integer", "object", "array", "null"])}, {})
    | schema({"$ref": st.just("#/$defs/Point")}, {})
    | st.just({})
)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    properties = st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    required = st.lists(st.sampled_from("abc"), max_size=2)
    more = {"required": required, "additionalProperties": st.booleans() | inner}
    return (
        schema({"type": st.just("object"), "properties": properties}, more)
        | schema({"type": st.just("array")}, {"items": inner, "minItems": sizes})
        | schema({"anyOf": st.lists(inner, min_size=1, max_size=2)}, {})
    )


parameters = schema(
    {"type": st.just("object"), "properties": st.dictionaries(st.sampled_from("abc"), st.recursive(leaves, nested))},
    {"required": st.just(["b"]), "additionalProperties": st.booleans()},
)
point = {"type": "object", "description": "On a plane.", "properties": {"x": {"type": "number"}}}


@some
@given(parameters=parameters, description=descriptions)
def test_the_same_types_as_the_oracle(oracles: dict[str, Any], parameters: Any, description: dict[str, str]) -> None:
    defined = {**parameters, "$defs": {"Point": point, "Zone": point}}
    tool = {"type": "function", "function": {"name": "f", "parameters": defined, **description}}
    itself = {"name": "itself", "parameters": TREE}
    assert typescript([tool, itself]) == oracles["typescript"]([tool, itself])
