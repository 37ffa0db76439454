"""The ChatML chat format, `<|im_start|>role\\ncontent<|im_end|>\\n` for every message, tools as Qwen has them (Hermes).

A `prl.providers.Renderer` for any tokenizer that has the two markers. `<tool_call>` and the like are written and read
as text: what they are tokenised as is the tokenizer's business. Reasoning is not set apart. Imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import ClassVar

from prl.providers import Tokenizer
from prl.rollout.markup import Marker, Part, spelled
from prl.rollout.tool_calls import Call, as_json, calls_of, json_object
from prl.rollout.turns import TurnRenderer, content_of, reply
from prl.types import Message, Tool

START, END = "<|im_start|>", "<|im_end|>"

_START, _END = Marker(START), Marker(END)
_CALL = re.compile(r"\s*<tool_call>((?:(?!<tool_call>).)*?)</tool_call>\s*", re.DOTALL)
_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
_TOOLS_END = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


class ChatMLRenderer(TurnRenderer):
    """Messages to tokens and back.

    Example:
        >>> tokens = renderer.start([{"role": "user", "content": "1+1"}])  # ... <|im_start|>assistant\\n
        >>> tokens += sampled + renderer.extend([{"role": "user", "content": "why?"}], stopped=True)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, ChatMLFormat())


class ChatMLFormat:
    """A `prl.rollout.turns.ChatFormat`."""

    markers: ClassVar = (START, END)
    stops: ClassVar = (END,)

    def opening(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Iterator[Part]:
        if tools:
            has_system = bool(messages) and messages[0]["role"] == "system"
            system = content_of(messages[0]) + "\n\n" if has_system else ""
            yield from (_START, f"system\n{system}{_TOOLS}", "\n".join(map(as_json, tools)), _TOOLS_END, _END, "\n")
            messages = messages[1:] if has_system else messages
        yield from _messages(messages)

    def invitation(self, turn: Message | None) -> tuple[Part, ...]:
        return (_START, "assistant\n")

    def said(self, turn: Message) -> Iterator[Part]:
        calls = [f"<tool_call>\n{_written(call)}\n</tool_call>" for call in calls_of(turn)]
        content = content_of(turn)
        yield "\n".join([content, *calls] if content or not calls else calls)

    def end(self, turn: Message | None, following: Sequence[Message]) -> Marker:
        return _END

    def between(self, messages: Sequence[Message], *, ended: Marker | None) -> Iterator[Part]:
        if ended is None:
            yield _END
        yield "\n"
        yield from _messages(messages)

    def parse(self, said: Sequence[Part], tools: Sequence[Tool]) -> Message:
        calls: list[Call] = []

        def take(found: re.Match[str]) -> str:
            call = _read_call(found[1])
            calls.extend([call] if call else [])
            return "" if call else found[0]

        return reply(_CALL.sub(take, spelled(said)), calls=calls)


def _messages(messages: Sequence[Message]) -> Iterator[Part]:
    """Messages that are not the assistant's; results of tools that follow each other share one turn of the user."""
    for role, run in groupby(messages, itemgetter("role")):
        contents = [content_of(message) for message in run]
        if role == "tool":
            results = [f"\n<tool_response>\n{content}\n</tool_response>" for content in contents]
            role, contents = "user", ["".join(results).removeprefix("\n")]
        for content in contents:
            yield from (_START, f"{role}\n{content}", _END, "\n")


def _written(call: Call) -> str:
    return f'{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}'


def _read_call(text: str) -> Call | None:
    call = json_object(text) or {}
    name, arguments = call.get("name"), call.get("arguments", {})
    return Call(name, as_json(arguments)) if isinstance(name, str) and isinstance(arguments, dict) else None
