"""A renderer for every chat format: a format says how a conversation is written, this module makes tokens of it.

    opening | invitation |  said  end | between | invitation |  said  end | ...
     prompt                 sampled     prompt                 sampled

Every turn of the assistant is written as it would have been sampled: the invitation it speaks after, then its own
words tokenised by themselves, then the token that ends it. So `start(a) + sampled + extend(b)` equals
`start([*a, parsed, *b])`, reasoning included, and no later turn rewrites an earlier one. Published templates are less
strict: they drop or reshape old reasoning unless told to keep it (each format's docstring says where that matters).

The PyPI package `renderers` covers most of these formats and is the oracle of the tests. It is not used at run time:
it makes special tokens of markers that a message merely spells, declares GLM-5.1 and Kimi-K2.5 not prefix-stable,
lacks GLM-5.2 and Kimi-K2.7, and brings openai, tiktoken and pydantic into every environment worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

from prl.errors import UserError
from prl.providers import Tokenizer
from prl.rollout.markup import Marker, Markup, Part
from prl.rollout.tool_calls import Call, written

if TYPE_CHECKING:
    from prl.types import Message, Tool

Parts: TypeAlias = Iterable[Part]


class ChatFormat(Protocol):
    """How a family of models writes a conversation. Text and markers only; knows no token."""

    @property
    def markers(self) -> tuple[str, ...]:
        """Every special token it writes or reads."""

    @property
    def stops(self) -> tuple[str, ...]:
        """The markers at which sampling stops."""

    def opening(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Parts:
        """What stands before the assistant's first turn; `messages` are none of the assistant's."""

    def invitation(self, turn: Message | None) -> Parts:
        """What the assistant speaks after; `turn` is what it said, None when it is about to speak."""

    def said(self, turn: Message) -> Parts:
        """The assistant's words, without what ends them."""

    def end(self, turn: Message | None, following: Sequence[Message]) -> Marker | None:
        """The marker a turn ends with; None where `following` needs one that is not sampled. `turn` may be unknown."""

    def between(self, messages: Sequence[Message], *, ended: Marker | None) -> Parts:
        """What stands after a turn; `ended` is the marker that is there already, None for a turn that was cut."""

    def parse(self, said: Sequence[Part], tools: Sequence[Tool]) -> Message:
        """A sampled turn, its stop token removed, as a message."""


class ThinkingOption(Protocol):
    """The field of a `[model]` section that a format with a switch for reasoning reads."""

    thinking: bool


class TurnRenderer:
    """A `prl.providers.Renderer` for one format and tokenizer."""

    def __init__(self, tokenizer: Tokenizer, chat: ChatFormat) -> None:
        self._chat = chat
        self._markup = Markup(tokenizer, chat.markers)
        self._invitation = self._markup.encode(chat.invitation(None))
        self.stop_tokens = tuple(tokenizer.special(stop) for stop in chat.stops)

    def start(self, messages: Sequence[Message], *, tools: Sequence[Tool] = ()) -> list[int]:
        """Every message, then the invitation to speak."""
        tokens, _ = self._rendered(messages, tools)
        return tokens + self._invitation

    def extend(self, messages: Sequence[Message], *, stopped: bool) -> list[int]:
        """What follows a sampled turn: the rest of its end, the messages that answer it, the next invitation.

        When it `stopped`, the marker it stopped at is in the ids already. Which one that was is not known here: where a
        format has several (GLM), it is taken to be the one that `messages` call for.
        """
        ended = self._chat.end(None, messages) if stopped else None
        return self._markup.encode(self._chat.between(messages, ended=ended)) + self._invitation

    def parse(self, completion: Sequence[int], *, tools: Sequence[Tool] = ()) -> Message:
        """A sampled turn as a message, with `reasoning_content` and `tool_calls` where there are any."""
        tokens = list(completion)
        if tokens and tokens[-1] in self.stop_tokens:
            tokens.pop()
        return self._chat.parse(self._markup.decode(tokens), tools)

    def demonstration(self, messages: Sequence[Message], *, tools: Sequence[Tool] = ()) -> tuple[list[int], list[bool]]:
        """The conversation; said are the assistant's words and the token that ends each turn, the last one included."""
        tokens, said = self._rendered(messages, tools)
        if messages and messages[-1]["role"] == "assistant":
            length = len(said) - said[::-1].index(True)
            return tokens[:length], said[:length]
        return tokens, said

    def _rendered(self, messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[list[int], list[bool]]:
        tokens: list[int] = []
        said: list[bool] = []
        for is_said, parts in self._stretches(messages, tools):
            stretch = self._markup.encode(parts)
            tokens += stretch
            said += [is_said] * len(stretch)
        return tokens, said

    def _stretches(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Iterator[tuple[bool, Parts]]:
        """The conversation in stretches that are said by the assistant or not, each tokenised by itself."""
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        nexts = [*turns, len(messages)][1:]
        yield False, self._chat.opening(messages[: turns[0] if turns else len(messages)], tools)
        for index, next_index in zip(turns, nexts, strict=True):
            turn, following = messages[index], messages[index + 1 : next_index]
            end = self._chat.end(turn, following)
            yield False, self._chat.invitation(turn)
            yield True, [*self._chat.said(turn), *([end] if end else [])]
            yield False, self._chat.between(following, ended=end)


def content_of(message: Message) -> str:
    """The text of a message; an assistant that only calls tools may have none. UserError when it is no text."""
    content = message.get("content")
    if content is None and message["role"] == "assistant":
        return ""
    if not isinstance(content, str):
        raise UserError(
            f"the content of a {message['role']} message is {type(content).__name__}; this chat format takes text only"
        )
    return content


def reasoning_of(message: Message) -> str:
    """What an assistant thought before it spoke; empty when it did not."""
    return message.get("reasoning_content") or ""


def unknown_role(message: Message, known: Sequence[str]) -> UserError:
    """The error for a message whose role a format has no place for."""
    return UserError(
        f"a message has the role {message['role']!r}; this chat format knows assistant, {', '.join(known)}"
    )


def split_reasoning(parts: Sequence[Part], *, close: Marker, call: Marker) -> tuple[list[Part], list[Part]]:
    """A turn that began thinking: its reasoning, and what it said then.

    Without `close` the first `call` ends the reasoning, as in vLLM's parsers; without either it is all reasoning.
    """
    for marker, skipped in ((close, 1), (call, 0)):
        if marker in parts:
            index = parts.index(marker)
            return list(parts[:index]), list(parts[index + skipped :])
    return list(parts), []


def reply(content: str, *, reasoning: str = "", calls: Sequence[Call] = ()) -> Message:
    """An assistant's message; `reasoning_content` and `tool_calls` are there when they are not empty."""
    message: dict[str, object] = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = written(calls)
    return message
