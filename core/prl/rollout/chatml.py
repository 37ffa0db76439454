"""The ChatML chat format: `<|im_start|>role\\ncontent<|im_end|>\\n` for every message.

A `prl.providers.Renderer` for any tokenizer that has the two markers. Append-only: what the policy sampled is never
tokenised again, so `start(a) + sampled + extend(b)` is the conversation as every later turn sees it. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from prl.errors import UserError
from prl.providers import Tokenizer
from prl.types import Message

START, END = "<|im_start|>", "<|im_end|>"


class ChatMLRenderer:
    """Messages to tokens and back.

    Example:
        >>> tokens = renderer.start([{"role": "user", "content": "1+1"}])  # ... <|im_start|>assistant\\n
        >>> tokens += sampled + renderer.extend([{"role": "user", "content": "why?"}], stopped=True)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._start, self._end = tokenizer.special(START), tokenizer.special(END)
        self._newline = tokenizer.encode("\n")
        self._invitation = [self._start, *tokenizer.encode("assistant\n")]
        self.stop_tokens = (self._end,)

    def start(self, messages: Sequence[Message]) -> list[int]:
        """Every message, then the opening of an assistant's turn."""
        return [*self._rendered(messages), *self._invitation]

    def extend(self, messages: Sequence[Message], *, stopped: bool) -> list[int]:
        """The rest of a sampled turn, the messages that answer it, and the opening of the next turn."""
        closing = self._newline if stopped else [self._end, *self._newline]
        return [*closing, *self.start(messages)]

    def parse(self, completion: Sequence[int]) -> Message:
        """The text of a sampled turn, without the stop token."""
        tokens = list(completion)
        if tokens and tokens[-1] in self.stop_tokens:
            tokens.pop()
        return {"role": "assistant", "content": self._tokenizer.decode(tokens)}

    def demonstration(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """The conversation up to its last `<|im_end|>`; the assistant says its contents and what ends each."""
        tokens: list[int] = []
        said: list[bool] = []
        for index, message in enumerate(messages):
            opening, body = self._parts(message)
            tokens += [*(self._newline if index else ()), *opening, *body]
            said += [False] * (len(tokens) - len(said) - len(body))
            said += [message["role"] == "assistant"] * len(body)
        return tokens, said

    def _rendered(self, messages: Sequence[Message]) -> list[int]:
        return [t for message in messages for part in (*self._parts(message), self._newline) for t in part]

    def _parts(self, message: Message) -> tuple[list[int], list[int]]:
        """What opens a message, and its content with the token that ends it.

        An assistant's content is tokenised by itself, as it was sampled; other messages in one piece with their role,
        as the templates of published models are.
        """
        role, content = message["role"], _text(message)
        if role == "assistant":
            return self._invitation, [*self._tokenizer.encode(content), self._end]
        return [self._start], [*self._tokenizer.encode(f"{role}\n{content}"), self._end]


def _text(message: Message) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise UserError(
            f"the content of a {message['role']} message is {type(content).__name__}; this chat format takes text only"
        )
    return content
