"""The chat format of GLM-5, GLM-5.1 and GLM-5.2, history kept (`clear_thinking=False`).

    [gMASK]<sop><|system|>be brief<|user|>hi<|assistant|><think>greet</think>hello<|user|>

No token ends a turn: the policy samples the marker of who speaks next, `<|observation|>` after a tool call, `<|user|>`
otherwise, and that marker also opens the next message. So `extend` never repeats it. Which marker was sampled is not
known to `extend`: it is taken to be the one the next message needs. A policy that stops at another one (`<|endoftext|>`
too) leaves it standing in place of the right one, and its next turn reads the answer so. That keeps the ids those it
sampled, and being misread is the policy's own doing, which the reward sees. A system message that answers a turn gets
its own `<|system|>`, which cannot be sampled.

Differs from the published templates in one thing: while thinking, an old turn without reasoning is written
`<think></think>`, as it was sampled (GLM-5 and GLM-5.1 publish `</think>`). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
from prl.providers import Renderer, Tokenizer
from prl.rollout.markup import Marker, Part, enclosed, marked, spelled
from prl.rollout.tool_calls import (
    Call,
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

STOPS = ("<|user|>", "<|observation|>", "<|endoftext|>")
SPECIAL_TOKENS = (
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|assistant|>",
    *STOPS,
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "<tool_response>",
    "</tool_response>",
)

_THINK, _THINK_END = Marker("<think>"), Marker("</think>")
_CALL, _CALL_END = Marker("<tool_call>"), Marker("</tool_call>")
_KEY, _KEY_END = Marker("<arg_key>"), Marker("</arg_key>")
_VALUE, _VALUE_END = Marker("<arg_value>"), Marker("</arg_value>")
_RESULT, _RESULT_END = Marker("<tool_response>"), Marker("</tool_response>")
_ROLES = {"system": Marker("<|system|>"), "user": Marker("<|user|>"), "tool": Marker("<|observation|>")}
_SAMPLED = {role: marker for role, marker in _ROLES.items() if marker.token in STOPS}

_TOOLS = (
    "<|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
_TOOLS_END = (
    "</tools>\n\nFor each function call, output the function name and arguments within the following XML format:\n"
    "<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>{arg-value-1}</arg_value>"
    "<arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>...</tool_call>"
)


@attrs.frozen(kw_only=True)
class Release:
    """What the published templates differ in."""

    effort: str = ""
    """A system line that opens every conversation held while thinking."""
    unthinking: str = "<|assistant|></think>"
    """The invitation of a turn that is not to reason."""
    bare_tools: bool = True
    """Tools are declared without OpenAI's envelope."""
    trims_reasoning: bool = True


GLM_5 = Release(bare_tools=False)
GLM_5_1 = Release()
GLM_5_2 = Release(
    effort="<|system|>Reasoning Effort: Max", unthinking="<|assistant|><think></think>", trims_reasoning=False
)


@attrs.frozen(kw_only=True)
class GlmFormat:
    """A `prl.rollout.turns.ChatFormat`; `thinking` invites the assistant to reason first."""

    markers: ClassVar = SPECIAL_TOKENS
    stops: ClassVar = STOPS
    release: Release
    thinking: bool

    def opening(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Iterator[Part]:
        effort = self.release.effort if self.thinking else ""
        yield from marked("[gMASK]<sop>" + effort, SPECIAL_TOKENS)
        if tools:
            yield from marked(_TOOLS, SPECIAL_TOKENS)
            yield "".join(self._declaration(tool) + "\n" for tool in tools)
            yield from marked(_TOOLS_END, SPECIAL_TOKENS)
        yield from _messages(messages)

    def _declaration(self, tool: Tool) -> str:
        function = function_of(tool)
        if not self.release.bare_tools:
            return as_json(tool)
        return as_json({key: value for key, value in function.items() if key not in ("defer_loading", "strict")})

    def invitation(self, turn: Message | None) -> Parts:
        thinks = self.thinking or (turn is not None and reasoning_of(turn))
        return marked("<|assistant|><think>" if thinks else self.release.unthinking, SPECIAL_TOKENS)

    def said(self, turn: Message) -> Iterator[Part]:
        reasoning = reasoning_of(turn)
        if reasoning or self.thinking:
            yield from (self._trimmed(reasoning), _THINK_END)
        yield content_of(turn).strip()
        for call in calls_of(turn):
            yield from (_CALL, call.name)
            for key, value in call.values().items():
                text = value if isinstance(value, str) else as_json(value)
                yield from (_KEY, key, _KEY_END, _VALUE, text, _VALUE_END)
            yield _CALL_END

    def end(self, turn: Message | None, following: Sequence[Message]) -> Marker | None:
        if following:
            return _SAMPLED.get(following[0]["role"])
        return _SAMPLED["tool" if turn is not None and turn.get("tool_calls") else "user"]

    def between(self, messages: Sequence[Message], *, ended: Marker | None) -> Parts:
        parts = list(_messages(messages))
        return parts[1:] if parts[:1] == [ended] else parts

    def parse(self, said: Sequence[Part], tools: Sequence[Tool]) -> Message:
        thought, rest = split_reasoning(said, close=_THINK_END, call=_CALL) if self.thinking else ([], said)
        kept, calls = take_calls(rest, _CALL, _CALL_END, partial(_read_call, tools))
        return reply(spelled(kept).strip(), reasoning=self._trimmed(spelled(thought)), calls=calls)

    def _trimmed(self, reasoning: str) -> str:
        return reasoning.strip() if self.release.trims_reasoning else reasoning


def _messages(messages: Sequence[Message]) -> Iterator[Part]:
    """Messages that are not the assistant's; results of tools that follow each other share one marker."""
    for role, run in groupby(messages, itemgetter("role")):
        if role == "tool":
            yield _ROLES[role]
        for message in run:
            if role not in _ROLES:
                raise unknown_role(message, list(_ROLES))
            elif role == "tool":
                yield from (_RESULT, content_of(message), _RESULT_END)
            else:
                yield from (_ROLES[role], content_of(message))


def _read_call(tools: Sequence[Tool], inner: Sequence[Part]) -> list[Call] | None:
    """`name` and any number of `<arg_key>k</arg_key><arg_value>v</arg_value>`, blanks allowed between the tags."""
    if not inner or isinstance(inner[0], Marker) or len(inner[0].split()) != 1:
        return None
    name, rest = inner[0].strip(), inner[1:]
    schemas, values = parameters_of(tools, name), dict[str, Any]()
    while spelled(rest).strip():
        key = enclosed(rest, _KEY, _KEY_END)
        value = enclosed(key[1], _VALUE, _VALUE_END) if key else None
        if key is None or value is None:
            return None
        name_of_value = spelled(key[0]).strip()
        values[name_of_value] = value_of(spelled(value[0]), schemas.get(name_of_value, {}))
        rest = value[1]
    return [Call(name, as_json(values))]


def glm_5(config: ThinkingOption, tokenizer: Tokenizer) -> Renderer:
    """`Model.render` of GLM-5."""
    return TurnRenderer(tokenizer, GlmFormat(release=GLM_5, thinking=config.thinking))


def glm_5_1(config: ThinkingOption, tokenizer: Tokenizer) -> Renderer:
    """`Model.render` of GLM-5.1."""
    return TurnRenderer(tokenizer, GlmFormat(release=GLM_5_1, thinking=config.thinking))


def glm_5_2(config: ThinkingOption, tokenizer: Tokenizer) -> Renderer:
    """`Model.render` of GLM-5.2."""
    return TurnRenderer(tokenizer, GlmFormat(release=GLM_5_2, thinking=config.thinking))
