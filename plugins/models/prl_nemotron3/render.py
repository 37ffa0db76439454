"""The chat format of Nemotron-3 Nano, Super and Ultra, history kept (`truncate_history_thinking=False`).

    <|im_start|>system\\nbe brief<|im_end|>\\n<|im_start|>user\\nhi<|im_end|>\\n
    <|im_start|>assistant\\n<think>\\ngreet</think>hello<|im_end|>\\n          (Ultra; all in one line)

Every conversation has a system message, which may be empty and is followed by the tools. Results of tools are a turn of
the user. Only `<|im_end|>` stops a turn: an `<|endoftext|>`, which some of the tokenizers have, would leave `extend`
with an end that no template writes.

Differs from the published templates in two things. While thinking, a turn without reasoning is written
`<think>\\n</think>`, as it was sampled after the invitation (published: `<think></think>`). And the invitation's
`\\n` is tokenised apart from the reasoning, as it was sampled. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
from prl.providers import Renderer, Tokenizer
from prl.rollout.markup import Marker, Part, marked, spelled
from prl.rollout.tool_calls import (
    Call,
    Schema,
    as_json,
    calls_of,
    function_of,
    parameters_of,
    take_calls,
    value_of,
)
from prl.rollout.turns import (
    Parts,
    ThinkingOption,
    TurnRenderer,
    content_of,
    reasoning_of,
    reply,
    split_reasoning,
    unknown_role,
)

if TYPE_CHECKING:
    from prl.types import Message, Tool

SPECIAL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)

_START, _END = Marker("<|im_start|>"), Marker("<|im_end|>")
_THINK_END = Marker("</think>")
_CALL, _CALL_END = Marker("<tool_call>"), Marker("</tool_call>")
_RESULT, _RESULT_END = Marker("<tool_response>"), Marker("</tool_response>")
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>\s*(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)
_LITERALS = {"True": True, "False": False, "None": None}
"""The template writes these three as Python does."""

_TOOLS = "# Tools\n\nYou have access to the following functions:\n\n<tools>\n"
_TOOLS_END = (
    "\n</tools>\n\nIf you choose to call a function ONLY reply in the following format with NO suffix:\n\n"
    "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
    "<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\nmultiple lines\n"
    "</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n"
    "- Function calls MUST follow the specified format: an inner <function=...></function> block must be nested within "
    "<tool_call></tool_call> XML tags\n"
    "- Required parameters MUST be specified\n"
    "- You may provide optional reasoning for your function call in natural language BEFORE the function call, but NOT "
    "after\n"
    "- If there is no function call available, answer the question like normal with your current knowledge and do not "
    "tell the user about function calls\n"
    "</IMPORTANT>"
)


@attrs.frozen(kw_only=True)
class NemotronFormat:
    """A `prl.rollout.turns.ChatFormat`; `thinking` invites the assistant to reason first.

    `newlines` puts `</think>` on a line of its own, as Nano and Super have it.
    """

    markers: ClassVar = SPECIAL_TOKENS
    stops: ClassVar = ("<|im_end|>",)
    newlines: bool
    thinking: bool

    def opening(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Iterator[Part]:
        has_system = bool(messages) and messages[0]["role"] == "system"
        system = content_of(messages[0]) if has_system else ""
        yield from (_START, "system\n", system)
        if tools:
            yield ("\n\n" if system else "") + _TOOLS + "\n".join(map(_declaration, tools))
            yield from marked(_TOOLS_END, SPECIAL_TOKENS)
        yield from (_END, "\n")
        yield from _messages(messages[1:] if has_system else messages)

    def invitation(self, turn: Message | None) -> Parts:
        thinks = self.thinking or (turn is not None and _reasoning(turn))
        thought = "<think>\n" if thinks else "<think></think>"
        return marked("<|im_start|>assistant\n" + thought, SPECIAL_TOKENS)

    def said(self, turn: Message) -> Iterator[Part]:
        reasoning, content, calls = _reasoning(turn), content_of(turn), calls_of(turn)
        glue = "\n" if reasoning and self.newlines else ""
        if reasoning or self.thinking:
            yield from (reasoning + glue, _THINK_END)
        yield (glue + content).rstrip()
        if calls:
            yield "\n"
        for call in calls:
            yield from (_CALL, _function(call), _CALL_END, "\n")

    def end(self, turn: Message | None, following: Sequence[Message]) -> Marker:
        return _END

    def between(self, messages: Sequence[Message], *, ended: Marker | None) -> Iterator[Part]:
        if ended is None:
            yield _END
        yield "\n"
        yield from _messages(messages)

    def parse(self, said: Sequence[Part], tools: Sequence[Tool]) -> Message:
        thought, rest = split_reasoning(said, close=_THINK_END, call=_CALL) if self.thinking else ([], said)
        kept, calls = take_calls(rest, _CALL, _CALL_END, partial(_read_call, tools))
        reasoning, content = spelled(thought), spelled(kept)
        if reasoning and self.newlines:
            reasoning, content = reasoning.removesuffix("\n"), content.removeprefix("\n")
        return reply(content.rstrip(), reasoning=reasoning if reasoning.strip() else "", calls=calls)


def _reasoning(turn: Message) -> str:
    reasoning = reasoning_of(turn)
    return reasoning if reasoning.strip() else ""


def _messages(messages: Sequence[Message]) -> Iterator[Part]:
    """Messages that are not the assistant's; results of tools that follow each other share one turn of the user."""
    for role, run in groupby(messages, itemgetter("role")):
        if role == "tool":
            results: list[tuple[Part, ...]] = [
                (_RESULT, f"\n{content_of(message)}\n", _RESULT_END, "\n") for message in run
            ]
            yield from (_START, "user\n", *chain.from_iterable(results), _END, "\n")
            continue
        for message in run:
            if role not in ("system", "user"):
                raise unknown_role(message, ("system", "user", "tool"))
            yield from (_START, f"{role}\n{content_of(message)}", _END, "\n")


def _function(call: Call) -> str:
    parameters = "".join(f"<parameter={k}>\n{_value(v)}\n</parameter>\n" for k, v in call.values().items())
    return f"\n<function={call.name}>\n{parameters}</function>\n"


def _value(value: Any) -> str:
    return as_json(value) if isinstance(value, dict | list) else str(value)


def _read_call(tools: Sequence[Tool], inner: Sequence[Part]) -> list[Call] | None:
    found = _FUNCTION.fullmatch(spelled(inner))
    if found is None:
        return None
    name, body = found[1].strip(), found[2]
    schemas, values, position = parameters_of(tools, name), dict[str, Any](), 0
    while position < len(body):
        parameter = _PARAMETER.match(body, position)
        if parameter is None:
            return None
        key, position = parameter[1].strip(), parameter.end()
        values[key] = _read_value(parameter[2], schemas.get(key, {}))
    return [Call(name, as_json(values))]


def _read_value(text: str, schema: Schema) -> Any:
    return _LITERALS[text] if text in _LITERALS and schema.get("type") != "string" else value_of(text, schema)


def _declaration(tool: Tool) -> str:
    """A function as XML; what the template does not know by name is appended as `<key>value</key>`."""
    function = function_of(tool)
    parameters = function.get("parameters") or {}
    lines = ["<function>", f"<name>{function['name']}</name>", *_described(function), "<parameters>"]
    for name, schema in parameters.get("properties", {}).items():
        lines += ["<parameter>", f"<name>{name}</name>", *_typed(schema), "</parameter>"]
    lines += _others(parameters, ("type", "properties", "required"))
    if "required" in parameters:
        lines.append(f"<required>{as_json(parameters['required'])}</required>")
    lines += ["</parameters>", *_others(function, ("type", "name", "description", "parameters")), "</function>"]
    return "\n".join(lines)


def _typed(schema: Schema) -> Iterator[str]:
    if "type" in schema:
        yield f"<type>{schema['type']}</type>"
    if "description" in schema:
        yield f"<description>{schema['description'].strip()}</description>"
    if "enum" in schema:
        yield f"<enum>{as_json(schema['enum'])}</enum>"
    yield from _others(schema, ("name", "type", "description", "enum"))


def _described(function: Mapping[str, Any]) -> list[str]:
    description = (function.get("description") or "").strip()
    return [f"<description>{description}</description>"] if description else []


def _others(mapping: Mapping[str, Any], known: Sequence[str]) -> list[str]:
    return [f"<{key}>{_value(value)}</{key}>" for key, value in mapping.items() if key not in known]


def nemotron_3_ultra(config: ThinkingOption, tokenizer: Tokenizer) -> Renderer:
    """`Model.render` of Nemotron-3-Ultra."""
    return TurnRenderer(tokenizer, NemotronFormat(newlines=False, thinking=config.thinking))


def nemotron_3(config: ThinkingOption, tokenizer: Tokenizer) -> Renderer:
    """`Model.render` of Nemotron-3 Nano and Super."""
    return TurnRenderer(tokenizer, NemotronFormat(newlines=True, thinking=config.thinking))
