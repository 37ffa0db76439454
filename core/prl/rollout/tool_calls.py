"""Tool declarations and tool calls in OpenAI's shape, between the messages of a conversation and a chat format's text.

Shared by the chat formats, which know how a call is spelled; this module knows what it says. What a person wrote (a
tool, a call of a demonstration) is checked and raises UserError; what a policy sampled never raises.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs

from prl.errors import UserError
from prl.rollout.markup import Marker, Part

if TYPE_CHECKING:
    from prl.types import Message, Tool

Schema: TypeAlias = Mapping[str, Any]
"""JSON schema of one parameter; empty when it is not declared."""


@attrs.frozen
class Call:
    """A function's name and its arguments as JSON text. `id` is empty in formats that write none."""

    name: str
    arguments: str
    id: str = ""

    def values(self) -> dict[str, Any]:
        """The arguments by name; UserError when they are no JSON object."""
        values = json_object(self.arguments)
        if values is None:
            raise UserError(f"the arguments of the call of {self.name!r} are no JSON object: {self.arguments!r}")
        return values


def calls_of(message: Message) -> list[Call]:
    """The calls an assistant's message makes; arguments that are an object already become JSON text."""
    return [_call(call) for call in message.get("tool_calls") or ()]


def _call(call: Mapping[str, Any]) -> Call:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"a tool call needs a function with a name, got {call!r}")
    arguments = function.get("arguments", "{}")
    text = arguments if isinstance(arguments, str) else as_json(arguments)
    return Call(function["name"], text, call.get("id") or "")


def written(calls: Iterable[Call]) -> list[dict[str, Any]]:
    """`tool_calls` of a message. A call without an id gets `call_<position>`, so that a result can name it."""
    return [
        {
            "id": call.id or f"call_{position}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for position, call in enumerate(calls)
    ]


def take_calls(
    parts: Iterable[Part], begin: Marker, end: Marker, read: Callable[[Sequence[Part]], list[Call] | None]
) -> tuple[list[Part], list[Call]]:
    """The parts that are no calls, and the calls.

    `read` is shown what stands between `begin` and `end`; where it returns None, or where `end` is missing, the attempt
    stays among the parts.
    """
    kept: list[Part] = []
    calls: list[Call] = []
    attempt: list[Part] = []
    for part in parts:
        if part == begin:
            kept += attempt
            attempt = [part]
        elif not attempt:
            kept.append(part)
        elif part == end:
            found = read(attempt[1:])
            kept += [] if found else [*attempt, part]
            calls += found or []
            attempt = []
        else:
            attempt.append(part)
    return kept + attempt, calls


def function_of(tool: Tool) -> Mapping[str, Any]:
    """The declared function, with or without OpenAI's envelope; UserError when it has no name."""
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"a tool needs a function with a name, got {tool!r}")
    return function


def parameters_of(tools: Sequence[Tool], name: str) -> Mapping[str, Schema]:
    """Schemas of the parameters of function `name`; empty when it is not declared."""
    for tool in tools:
        function = function_of(tool)
        if function["name"] == name:
            properties = (function.get("parameters") or {}).get("properties") or {}
            return {key: schema for key, schema in properties.items() if isinstance(schema, Mapping)}
    return {}


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object that `text` is, or None."""
    try:
        value = _json(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def value_of(text: str, schema: Schema) -> Any:
    """An argument that a format wrote without quotes: the text itself where a string is declared, else JSON if it is.

    The rule of vLLM's and SGLang's parsers for GLM and Qwen3-Coder.
    """
    if schema.get("type") == "string":
        return text
    try:
        return _json(text)
    except (ValueError, RecursionError):
        return text


def _json(text: str) -> Any:
    """json.loads, which takes NaN and what overflows to infinity for numbers, made strict."""
    value = json.loads(text)
    as_json(value)
    return value


def as_json(value: Any) -> str:
    """JSON as chat templates write it (transformers' `tojson`); ValueError for NaN and infinities."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
