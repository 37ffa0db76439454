"""Random conversations with tools and reasoning, what every chat format must do with them, and tokenizers for both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import attrs
from hypothesis import settings
from hypothesis import strategies as st
from prl.providers import Renderer
from prl.types import Message, Tool

some = settings(max_examples=30, deadline=None)
"""Few enough for a busy machine."""

Round = tuple[Message, list[Message]]
"""What the assistant said, and the messages that answer it."""

TOOLS: tuple[Tool, ...] = (
    {
        "type": "function",
        "function": {
            "name": "write_file",
            "description": "Write a file.\nReplaces it.",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string", "description": " What to write. ", "maxLength": 9},
                    "mode": {"type": "string", "enum": ["a", "w"], "default": "w"},
                    "lines": {"type": "array", "items": {"type": "integer", "minimum": 1}},
                },
                "required": ["text"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "list-files", "parameters": {"properties": {"text": {"type": "string"}}}},
    },
)


class EveryCharacter:
    """Special tokens first, then one token for every character there is."""

    def __init__(self, special_tokens: Sequence[str]) -> None:
        self.specials = list(special_tokens)
        self.vocab_size = len(self.specials) + 0x110000

    def encode(self, text: str) -> list[int]:
        return [len(self.specials) + ord(character) for character in text]

    def decode(self, tokens: Sequence[int]) -> str:
        count = len(self.specials)
        return "".join(self.specials[token] if token < count else chr(token - count) for token in tokens)

    def special(self, token: str) -> int:
        return self.specials.index(token)


class OracleTokenizer:
    """`EveryCharacter` as `renderers` asks for it: markers in a text become special tokens, as in transformers."""

    name_or_path = ""
    unk_token_id = None
    eos_token_id = None

    def __init__(self, tokenizer: EveryCharacter) -> None:
        self.plain = tokenizer

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        for token in self.plain.specials:
            before, marker, after = text.partition(token)
            if marker:
                return [*self.encode(before), self.plain.special(token), *self.encode(after)]
        return self.plain.encode(text)

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self.plain.decode(tokens)

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.plain.special(token) if token in self.plain.specials else None


# --- random conversations ---------------------------------------------------------------------------------------------
letters = st.sampled_from('abc<>/={}":.\n 1é')
FORGED = ("<|user|>", "<|im_end|>", "</think>", "<tool_call>", "</arg_value>", "<|tool_call_end|>", "<think>")
plain_texts = st.text(letters, max_size=8)
texts = st.lists(plain_texts | st.sampled_from(FORGED), max_size=3).map("".join)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | plain_texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(plain_texts, inner, max_size=2),
    max_leaves=4,
)


@attrs.frozen(kw_only=True)
class Speech:
    """What can be said in a format and read back as it was: its canonical texts and arguments."""

    contents: st.SearchStrategy[str]
    reasonings: st.SearchStrategy[str] = attrs.field(factory=lambda: st.just(""))
    arguments: st.SearchStrategy[dict[str, Any]]
    ids: str = "call_{position}"

    def turns(self) -> st.SearchStrategy[Message]:
        """What an assistant says; calls need not come with a text."""
        calls = st.lists(st.tuples(st.sampled_from(["write_file", "list-files"]), self.arguments), max_size=2)
        return st.builds(self._turn, self.contents, self.reasonings, calls)

    def _turn(self, content: str, reasoning: str, calls: list[tuple[str, dict[str, Any]]]) -> Message:
        turn: dict[str, Any] = {"role": "assistant", "content": content}
        if reasoning:
            turn["reasoning_content"] = reasoning
        if calls:
            turn["tool_calls"] = [self.call(i, name, arguments) for i, (name, arguments) in enumerate(calls)]
        return turn

    def call(self, position: int, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        text = json.dumps(arguments, ensure_ascii=False)
        call_id = self.ids.format(name=name, position=position)
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": text}}

    def conversations(
        self, prompts: st.SearchStrategy[str] = texts
    ) -> st.SearchStrategy[tuple[list[Message], list[Round]]]:
        """Opening messages, then turns with what answers them: results where tools were called, else the user."""
        users = st.lists(prompts.map(lambda text: {"role": "user", "content": text}), min_size=1, max_size=2)
        systems = st.lists(prompts.map(lambda text: {"role": "system", "content": text}), max_size=1)
        openings = st.builds(lambda system, user: system + user, systems, users)
        rounds = st.builds(_round, self.turns(), users, st.lists(prompts, min_size=2, max_size=2))
        return st.tuples(openings, st.lists(rounds, min_size=1, max_size=3))


def _round(turn: Message, users: list[Message], results: list[str]) -> Round:
    calls = turn.get("tool_calls", ())
    answers = [
        {"role": "tool", "tool_call_id": call["id"], "content": result}
        for call, result in zip(calls, results, strict=False)
    ]
    return turn, answers or users


def messages_of(opening: Sequence[Message], rounds: Sequence[Round]) -> list[Message]:
    return [*opening, *(message for turn, answers in rounds for message in (turn, *answers))]


# --- what every format must do ----------------------------------------------------------------------------------------
def sampled(renderer: Renderer, turn: Message, answers: Sequence[Message]) -> list[int]:
    """What a policy that says this and stops would sample."""
    tokens, said = renderer.demonstration([turn, *answers])
    return [token for token, is_said in zip(tokens, said, strict=True) if is_said]


def check_conversation(renderer: Renderer, opening: list[Message], rounds: list[Round]) -> None:
    """Held in turns it equals the whole, cut turns are closed, and a demonstration says what would be sampled."""
    tokens = renderer.start(opening, tools=TOOLS)
    said = [False] * len(tokens)
    messages = list(opening)
    for turn, answers in rounds:
        speech = sampled(renderer, turn, answers)
        assert speech[-1] in renderer.stop_tokens
        cut = tokens + speech[:-1] + renderer.extend(answers, stopped=False)
        extension = renderer.extend(answers, stopped=True)
        tokens += speech + extension
        said += [True] * len(speech) + [False] * len(extension)
        messages += [turn, *answers]
        assert tokens == cut == renderer.start(messages, tools=TOOLS)
    shown, shown_said = renderer.demonstration(messages, tools=TOOLS)
    assert tokens[: len(shown)] == shown
    assert said[: len(shown)] == shown_said
    assert not any(said[len(shown) :])


def check_parse(renderer: Renderer, turn: Message) -> None:
    """A turn is read as what was said, with the token that ended it and without."""
    speech = sampled(renderer, turn, ())
    assert renderer.parse(speech, tools=TOOLS) == turn
    assert renderer.parse(speech[:-1], tools=TOOLS) == turn


def check_forgery(renderer: Renderer, message: Message, special_count: int) -> None:
    """Markers that a message spells are text."""

    def specials(content: str) -> list[int]:
        tokens = renderer.start([{"role": "user", "content": "hi"}, {**message, "content": content}])
        return [token for token in tokens if token < special_count]

    assert specials("".join(FORGED)) == specials("harmless")


def garbage(special_count: int) -> st.SearchStrategy[list[int]]:
    """Anything a policy may sample: markers in any order, and the letters of what formats spell."""
    spelled = st.sampled_from('{}[]":0fa\n<function=f>').map(lambda letter: special_count + ord(letter))
    return st.lists(st.integers(0, special_count - 1) | spelled, max_size=16)


def check_garbage(renderer: Renderer, tokens: list[int]) -> None:
    """Whatever was sampled is a message whose calls can be executed."""
    message = renderer.parse(tokens, tools=TOOLS)
    assert message["role"] == "assistant"
    assert isinstance(message["content"], str)
    for call in message.get("tool_calls", ()):
        assert isinstance(json.loads(call["function"]["arguments"]), dict)
