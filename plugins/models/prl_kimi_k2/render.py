"""The chat format of Kimi-K2, Kimi-K2.5 and Kimi-K2.7, history kept (`preserve_thinking`, which K2.7 always has).

    <|im_system|>system<|im_middle|>be brief<|im_end|><|im_user|>user<|im_middle|>hi<|im_end|>
    <|im_assistant|>assistant<|im_middle|><think>greet</think>hello<|im_end|>            (all in one line)

A call is named by its id, `functions.<name>:<n>`, n counting the calls of a conversation; the id is all that tells the
policy which function it called. Calls that come with other ids (OpenAI's are arbitrary) get ids of this form, and so do
the results that answer them. K2 does not reason, declares tools as JSON instead of TypeScript, and is introduced to
itself where no system message does it. Imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING, ClassVar

import attrs
from prl.providers import Renderer, Tokenizer
from prl.rollout.markup import Marker, Part, enclosed, marked, spelled
from prl.rollout.tool_calls import Call, calls_of, json_object, take_calls, written
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

from prl_kimi_k2.declare import typescript

if TYPE_CHECKING:
    from prl.types import Message, Tool

_SPOKEN = (
    "<|im_system|>",
    "<|im_user|>",
    "<|im_assistant|>",
    "<|im_middle|>",
    "<|im_end|>",
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)
SPECIAL_TOKENS = (*_SPOKEN, "<think>", "</think>")

_SYSTEM, _USER, _MIDDLE, _END = (Marker(f"<|im_{name}|>") for name in ("system", "user", "middle", "end"))
_THINK_END = Marker("</think>")
_CALLS, _CALLS_END = Marker("<|tool_calls_section_begin|>"), Marker("<|tool_calls_section_end|>")
_CALL, _CALL_END = Marker("<|tool_call_begin|>"), Marker("<|tool_call_end|>")
_ARGUMENTS = Marker("<|tool_call_argument_begin|>")
_ROLES = {"system": _SYSTEM, "user": _USER, "tool": _SYSTEM}
_ID = re.compile(r"(?:functions\.)?(?P<name>\S+):\d+")
_INTRODUCTION = "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>\n"


@attrs.frozen(kw_only=True)
class KimiFormat:
    """A `prl.rollout.turns.ChatFormat` of K2.5 and later; `thinking` invites the assistant to reason first."""

    markers: ClassVar[tuple[str, ...]] = SPECIAL_TOKENS
    stops: ClassVar = ("<|im_end|>",)
    thinking: bool

    def opening(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Iterator[Part]:
        if tools:
            yield from (_SYSTEM, "tool_declare", _MIDDLE, typescript(tools), _END)
        yield from _messages(messages)

    def invitation(self, turn: Message | None) -> Parts:
        thinks = self.thinking or (turn is not None and reasoning_of(turn))
        thought = "<think>" if thinks else "<think></think>"
        return marked("<|im_assistant|>assistant<|im_middle|>" + thought, SPECIAL_TOKENS)

    def said(self, turn: Message) -> Iterator[Part]:
        reasoning = reasoning_of(turn)
        if reasoning or self.thinking:
            yield from (reasoning, _THINK_END)
        yield from _spoken(turn)

    def end(self, turn: Message | None, following: Sequence[Message]) -> Marker:
        return _END

    def between(self, messages: Sequence[Message], *, ended: Marker | None) -> Iterator[Part]:
        if ended is None:
            yield _END
        yield from _messages(messages)

    def parse(self, said: Sequence[Part], tools: Sequence[Tool]) -> Message:
        thought, rest = split_reasoning(said, close=_THINK_END, call=_CALLS) if self.thinking else ([], said)
        kept, calls = take_calls(rest, _CALLS, _CALLS_END, _read_calls)
        return reply(spelled(kept), reasoning=spelled(thought), calls=calls)


@attrs.frozen(kw_only=True)
class KimiK2Format(KimiFormat):
    """K2, before it learnt to reason."""

    markers: ClassVar[tuple[str, ...]] = _SPOKEN
    thinking: bool = attrs.field(default=False, init=False)

    def opening(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Iterator[Part]:
        if tools:
            declared = json.dumps(list(tools), separators=(",", ":"), sort_keys=True, ensure_ascii=False)
            yield from (_SYSTEM, "tool_declare", _MIDDLE, declared, _END)
        if not messages or messages[0]["role"] != "system":
            yield from marked(_INTRODUCTION, _SPOKEN)
        yield from _messages(messages)

    def invitation(self, turn: Message | None) -> Parts:
        return marked("<|im_assistant|>assistant<|im_middle|>", _SPOKEN)

    def said(self, turn: Message) -> Iterator[Part]:
        yield from _spoken(turn)


class KimiRenderer(TurnRenderer):
    """A `TurnRenderer` that gives calls the ids the policy knows them by."""

    def start(self, messages: Sequence[Message], *, tools: Sequence[Tool] = ()) -> list[int]:
        return super().start(with_native_ids(messages), tools=tools)

    def demonstration(self, messages: Sequence[Message], *, tools: Sequence[Tool] = ()) -> tuple[list[int], list[bool]]:
        return super().demonstration(with_native_ids(messages), tools=tools)


def with_native_ids(messages: Sequence[Message]) -> list[Message]:
    """The conversation with every call's id in the form `functions.<name>:<n>`; ids of that form stay as they are."""
    position, renamed = count(), dict[str, str]()
    return [_renamed(message, position, renamed) for message in messages]


def _renamed(message: Message, position: Iterator[int], renamed: dict[str, str]) -> Message:
    """`renamed` remembers the calls so far for the results that answer them."""
    if message["role"] == "tool":
        answered = message.get("tool_call_id") or ""
        return {**message, "tool_call_id": renamed.get(answered, answered)}
    calls = calls_of(message)
    native = [attrs.evolve(call, id=_native(call, next(position))) for call in calls]
    renamed.update((call.id, new.id) for call, new in zip(calls, native, strict=True))
    return {**message, "tool_calls": written(native)} if native else message


def _native(call: Call, position: int) -> str:
    return call.id if _called(call.id) == call.name else f"functions.{call.name}:{position}"


def _called(call_id: str) -> str | None:
    """The function an id names."""
    found = _ID.fullmatch(call_id.strip())
    return found["name"] if found else None


def _messages(messages: Sequence[Message]) -> Iterator[Part]:
    for message in messages:
        role = message["role"]
        if role not in _ROLES:
            raise unknown_role(message, list(_ROLES))
        yield from (_ROLES[role], message.get("name") or role, _MIDDLE)
        if role == "tool":
            yield f"## Return of {message.get('tool_call_id') or ''}\n"
        yield from (content_of(message), _END)


def _spoken(turn: Message) -> Iterator[Part]:
    yield content_of(turn)
    calls = calls_of(turn)
    if calls:
        yield _CALLS
        for call in calls:
            yield from (_CALL, call.id, _ARGUMENTS, call.arguments, _CALL_END)
        yield _CALLS_END


def _read_calls(section: Sequence[Part]) -> list[Call] | None:
    """The calls of a section; None as soon as one is not well-formed."""
    calls: list[Call] = []
    rest: Sequence[Part] = section
    while spelled(rest).strip():
        found = enclosed(rest, _CALL, _CALL_END)
        call = _read_call(found[0]) if found else None
        if found is None or call is None:
            return None
        calls.append(call)
        rest = found[1]
    return calls


def _read_call(inner: Sequence[Part]) -> Call | None:
    if _ARGUMENTS not in inner:
        return None
    middle = inner.index(_ARGUMENTS)
    call_id, arguments = spelled(inner[:middle]).strip(), spelled(inner[middle + 1 :])
    name = _called(call_id)
    return None if name is None or json_object(arguments) is None else Call(name, arguments, call_id)


def kimi_k2(config: object, tokenizer: Tokenizer) -> Renderer:
    """`Model.render` of Kimi-K2."""
    return KimiRenderer(tokenizer, KimiK2Format())


def kimi_k2_5(config: ThinkingOption, tokenizer: Tokenizer) -> Renderer:
    """`Model.render` of Kimi-K2.5."""
    return KimiRenderer(tokenizer, KimiFormat(thinking=config.thinking))


def kimi_k2_7(config: object, tokenizer: Tokenizer) -> Renderer:
    """`Model.render` of Kimi-K2.7, which always reasons."""
    return KimiRenderer(tokenizer, KimiFormat(thinking=True))
