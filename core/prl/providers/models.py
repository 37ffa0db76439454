"""Models: the network, its weights and their names, its limits, and how it speaks. See `prl.providers`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import attrs

from prl.providers.provider import Provider, Ref

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prl.blocks.context import Context
    from prl.types import Message, Tool


@attrs.frozen(kw_only=True)
class Model(Provider):
    """A family of language models; the same module serves the trainer and the embedded engine."""

    build: Ref
    """`(config, vocab_size) -> nn.Module` implementing `LanguageModel`, on the current default device, initialised."""
    weights: Ref
    """`(config, vocab_size) -> WeightMap` between the module's tensors and Hugging Face's names."""
    render: Ref
    """`(config, tokenizer) -> Renderer`; imports no torch."""
    special_tokens: tuple[str, ...]
    """Special tokens of the chat format; a character tokenizer is given these."""
    float32: tuple[str, ...] = ()
    """Endings of the names of tensors that are float32 in every number format, in the module and on every wire."""
    routing: Ref | None = None
    """`(config) -> prl.compose.routing.Routing` of a model with experts; imports no torch. None: nothing is routed."""
    unquantized: tuple[str, ...] = ()
    """Regular expressions, found in the published names of matrices that no number format quantises (routers, ...)."""
    checkpoint_types: tuple[str, ...] = ()
    """`model_type` of the config.json of the family's checkpoints; `config` then has a field `checkpoint`."""
    limits: Ref | None = None
    """`(config, vocab_size) -> Sequence[Limit]`; imports no torch. UserError says why there is no such model."""


Degree: TypeAlias = Literal["expert", "tensor", "context", "heads"]
"""A kind of parallelism: over how many ranks experts, a layer's matrices, a sequence, or the heads of an attention that
is otherwise whole (`trainer.context_attention`) are spread."""


@attrs.frozen(kw_only=True)
class Limit:
    """What a model's shape says about a degree of parallelism: it must divide `count`.

    Example:
        >>> Limit(degree="tensor", of="groups of Mamba-2", count=8)  # 1, 2, 4 or 8
    """

    degree: Degree
    of: str
    """What is spread."""
    count: int
    reason: str = ""
    """Why it cannot be spread further, where that is no matter of arithmetic."""


class LanguageModel(Protocol):
    """What trainer and embedded engine call; an nn.Module over `prl.blocks` (or anything that answers to this).

    One packed layout: `T` tokens of `S` documents one after the other, no batch dimension, no padding.
    """

    layers: nn.ModuleList
    """The units of activation checkpointing, compilation and FSDP."""

    def hidden(self, tokens: Tensor, context: Context) -> Tensor:
        """tokens [T] int64 -> final normed hidden states [T, D].

        A model with an attribute `shares_prefixes` that is True is trained on rows that several documents share
        (`Context.shared`).
        """

    def head(self) -> Tensor:
        """The output projection [vocab, D]: logits = hidden @ head().T"""

    def new_caches(self, rows: int, length: int) -> list[Any]:
        """One cache per layer with room for `rows` sequences of `length` tokens, in the parameters' dtype and device.

        Each cache has `copy_row(source, target, length)`: the first `length` tokens of one row into another; and
        `prefix_reusable`, False where the state after a row's last token is all there is, so that only a whole row can
        be copied.
        """


class WeightMap(Protocol):
    """Reversible, streaming, exact: `from_hf(to_hf(x)) == x`, bit for bit, for every tensor."""

    def to_hf(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        """A module tensor -> the Hugging Face tensors it is stored as (views where possible)."""

    def from_hf(self, tensors: Mapping[str, Any], name: str) -> Tensor:
        """The module tensor `name`, read from a mapping of Hugging Face names to tensors (lazily indexed)."""

    def hf_config(self) -> Mapping[str, Any]:
        """The `config.json` transformers and vLLM need to load the exported weights."""

    @property
    def carried(self) -> Sequence[str]:
        """Prefixes of checkpoint tensors the module has no part for and checkpoints keep (vision, token prediction)."""


class Tokenizer(Protocol):
    """Text to token ids and back. `prl.rollout.tokenizer.load` builds one from the `[tokenizer]` section."""

    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def special(self, token: str) -> int:
        """Id of a special token such as `<|im_end|>`; a UserError names the token when there is none."""


class Renderer(Protocol):
    """Messages to tokens and back, append-only: a later turn extends the ids of the one before it."""

    stop_tokens: tuple[int, ...]

    def start(self, messages: Sequence[Message], *, tools: Sequence[Tool] = ()) -> list[int]:
        """Tokens of a conversation's opening messages, ending where the assistant begins to speak.

        `tools` are declared to the policy where its chat format has a place for them.
        """

    def extend(self, messages: Sequence[Message], *, stopped: bool) -> list[int]:
        """Tokens to append after a sampled assistant turn so that it can speak again after `messages`.

        `stopped` says whether the turn ended in a stop token (else the renderer closes it).
        """

    def parse(self, completion: Sequence[int], *, tools: Sequence[Tool] = ()) -> Message:
        """A sampled turn (stop token included or not) as an assistant message; never raises.

        What is no well-formed tool call stays in `content`. `tools` tell text from numbers in formats that write both
        alike.
        """

    def demonstration(self, messages: Sequence[Message], *, tools: Sequence[Tool] = ()) -> tuple[list[int], list[bool]]:
        """A whole conversation as tokens, and which of them the assistant says (stop token included)."""
