"""The glossary: what flows through prl, in the order in which it comes to be.

    TaskRef -> Task -> Completion -> Turn -> Rollout -> Group -> Sample -> MicroBatch -> Batch -> Manifest

Per-token columns are numpy arrays, never lists of numbers. `L` is the number of tokens of one rollout or sample, `T` of
a packed micro-batch, `S` the number of samples in it. Column `c[t]` always speaks about token `t` (not about the
prediction made at `t`): `logprobs[t]` is log p(token t | tokens before t). This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import cached_property
from typing import Any, Literal, TypeAlias

import attrs
import numpy as np
from numpy.typing import NDArray

Message: TypeAlias = Mapping[str, Any]
"""A chat message as OpenAI's API writes it: `{"role": "user", "content": "..."}`.

An assistant's may also have `reasoning_content` (text) and `tool_calls` (`[{"id", "type": "function", "function":
{"name", "arguments": JSON text}}]`); `{"role": "tool", "tool_call_id", "content"}` answers one call.
"""

Tool: TypeAlias = Mapping[str, Any]
"""A function the policy may call, as OpenAI's API writes it: `{"type": "function", "function": {"name", "description",
"parameters": JSON schema}}`."""

Int32: TypeAlias = NDArray[np.int32]
Float32: TypeAlias = NDArray[np.float32]
Bool: TypeAlias = NDArray[np.bool_]
Split: TypeAlias = Literal["train", "eval"]
Stream: TypeAlias = Literal["rl", "ce", "ref_kl"]
STREAMS: tuple[Stream, ...] = ("rl", "ce", "ref_kl")


@attrs.frozen(kw_only=True)
class TaskRef:
    """The name of a task. Tasks live with their environment; the controller only ever holds these."""

    environment: str
    """Name of the environment section (`name`, by default its `type`)."""
    split: Split
    index: int


@attrs.frozen(kw_only=True)
class Task:
    """One problem, as its environment states it."""

    index: int
    messages: tuple[Message, ...]
    """What opens the conversation."""
    data: Mapping[str, Any] = attrs.field(factory=dict)
    """Whatever the environment needs to score it; stays in the environment's process."""


class StopReason(Enum):
    """Why a completion ended."""

    STOP = "stop"  # the policy sampled a stop token
    LENGTH = "length"  # max_tokens, or the sequence limit, was reached
    ABORT = "abort"  # the engine was told to abort; the tokens so far are valid


@attrs.frozen(kw_only=True)
class Sampling:
    """How to sample. Train-time sampling is temperature only: truncation would bias importance ratios."""

    temperature: float = 1.0
    """0 is greedy; log-probabilities are then those of temperature 1."""
    max_tokens: int = 256
    min_tokens: int = 0
    """Stop tokens cannot be sampled before this many tokens; their logits are masked and the logprobs renormalised."""
    seed: int = 0
    """Member `i` of a request with `n > 1` samples with `seed + i`; equal seeds give equal tokens."""


@attrs.frozen(kw_only=True)
class Routes:
    """The experts that `n` consecutive tokens of a sequence were sent to, each as the input of a forward pass.

    Row `r` speaks about token `start + r` of prompt and completion. The last token an engine samples is never computed,
    so it has no row.
    """

    layers: tuple[str, ...]
    """[M] names of decoder layers, `layers.<i>` as Hugging Face counts them. Those without experts mean nothing."""
    experts: NDArray[Any]  # [n, M, K] uint8, or uint16 above 256 experts
    versions: Int32  # [n] policy version of the weights that chose; -1: not known, the row means nothing
    start: int = 0


@attrs.frozen(kw_only=True)
class Completion:
    """What an engine returns for one sampled continuation of `n` new tokens."""

    tokens: Int32  # [n]
    logprobs: Float32  # [n] under the sampling temperature
    versions: Int32  # [n] policy version that sampled each token, non-decreasing
    stop: StopReason
    routes: Routes | None = None
    """Of prompt and completion, where they were asked for."""


@attrs.frozen(kw_only=True)
class Carried:
    """Where a checkpoint has what was finished of a group in flight (`prl.rollout.carried`)."""

    group_id: int
    attempt: int
    oldest_version: int
    """Policy version that sampled the oldest of its tokens."""
    file: str
    offset: int
    """Bytes from the start of the file."""
    nbytes: int


@attrs.frozen(kw_only=True)
class Turn:
    """One assistant turn inside a rollout: tokens `start:end` were sampled."""

    start: int
    end: int
    stop: StopReason


@attrs.frozen(kw_only=True)
class ColumnReference:
    """A column too large for a message: where its bytes rest until it was trained (see `prl.columns`)."""

    file: str
    """Name in the run's folder of columns."""
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    checksum: int
    """zlib.crc32 of the bytes."""


Pieces: TypeAlias = tuple[ColumnReference, ...]
"""A column in pieces along its tokens, in order: what several columns begin with can be stored once."""


@attrs.frozen(kw_only=True)
class Rollout:
    """One finished conversation with its tokens, exactly as sampled."""

    rollout_id: str
    """`<group id>.<member>`."""
    tokens: Int32  # [L]
    sampled: Bool  # [L] True where the policy sampled the token: the loss mask
    logprobs: Float32  # [L] engine log-probability of sampled tokens, 0 elsewhere
    versions: Int32  # [L] policy version of sampled tokens, -1 elsewhere
    temperature: float
    turns: tuple[Turn, ...]
    messages: tuple[Message, ...]
    """The conversation as text, for people."""
    reward: float
    metrics: Mapping[str, float] = attrs.field(factory=dict)
    """Scalars of the environment; `accuracy` (0 or 1) is the one evaluation reads."""
    large: Mapping[str, Pieces] = attrs.field(factory=dict)
    """Columns [L, ...] that travel by reference."""

    @property
    def sampled_count(self) -> int:
        return int(self.sampled.sum())

    @cached_property
    def oldest_version(self) -> int:
        """Version of the first sampled token; -1 when nothing was sampled."""
        sampled = self.versions[self.sampled]
        return int(sampled.min()) if sampled.size else -1

    @property
    def truncated(self) -> bool:
        return bool(self.turns) and self.turns[-1].stop is StopReason.LENGTH


@attrs.frozen(kw_only=True)
class Failure:
    """A rollout that did not come to be, through no fault of the policy."""

    rollout_id: str
    where: str
    """`environment` or `engine`."""
    error: str


@attrs.frozen(kw_only=True)
class Group:
    """The rollouts of one task (siblings, in GRPO's sense)."""

    group_id: int
    """Issue number, unique in a run: groups are trained in this order."""
    task: TaskRef
    attempt: int
    """0 for the first issue of this task in this group, +1 for each retry after a cut or a failure."""
    started_version: int
    """Newest policy version when the group was dispatched."""
    rollouts: tuple[Rollout, ...]
    failures: tuple[Failure, ...] = ()

    @cached_property
    def oldest_version(self) -> int:
        """Oldest policy version of any sampled token."""
        versions = [r.oldest_version for r in self.rollouts if r.sampled_count]
        return min(versions, default=self.started_version)

    @property
    def rewards(self) -> tuple[float, ...]:
        return tuple(r.reward for r in self.rollouts)


@attrs.frozen(kw_only=True)
class Sample:
    """One token sequence with everything a step needs to train on it.

    A token belongs to a stream iff its weight there is not 0; the weight multiplies its per-token loss, and each stream
    is divided by its own global number of tokens.
    """

    tokens: Int32  # [L]
    sampled: Bool  # [L] tokens whose engine_logprobs and versions mean something
    engine_logprobs: Float32  # [L]
    versions: Int32  # [L]
    advantages: Float32  # [L]
    temperature: float
    weights: Mapping[Stream, Float32]  # stream -> [L]; absent = all zero
    ref_logprobs: Float32 | None = None  # [L] for the ref_kl stream
    large: Mapping[str, Pieces] = attrs.field(factory=dict)  # [L, ...] each, by reference

    def __len__(self) -> int:
        return len(self.tokens)


@attrs.frozen(kw_only=True)
class ContextShard:
    """The share of a packed micro-batch that is computed by one of the ranks of a context group."""

    index: int
    count: int
    rows: int
    """Tokens each rank computes; padded at the end, the micro-batch has `count * rows`."""


@attrs.frozen(kw_only=True)
class MicroBatch:
    """`S` samples packed one after the other: what one forward and backward of one rank sees. No padding.

    Under a `shard` the columns are those of tokens `index * rows` to `(index + 1) * rows`, the last one included: what
    is predicted at the end of a share is the first token of the next. `cu_seqlens` and `large` are always the whole's.
    """

    tokens: Int32  # [T]
    cu_seqlens: Int32  # [S + 1] sample s is tokens[cu_seqlens[s]:cu_seqlens[s + 1]]
    temperatures: Float32  # [T]
    advantages: Float32  # [T]
    engine_logprobs: Float32  # [T]
    versions: Int32  # [T]
    sampled: Bool  # [T]
    weights: Mapping[Stream, Float32]  # stream -> [T], only streams that occur in the batch
    ref_logprobs: Float32 | None = None  # [T]
    large: Mapping[str, tuple[Pieces, ...]] = attrs.field(factory=dict)
    """Name -> the pieces of each of the `S` samples, none for a sample without that column."""
    shard: ContextShard | None = None

    @property
    def own(self) -> slice:
        """Which of the columns' tokens no other rank has."""
        return slice(None if self.shard is None else self.shard.rows)


@attrs.frozen(kw_only=True)
class Batch:
    """One optimizer step: for each trainer rank the same number of micro-batches."""

    step: int
    version: int
    """Policy version being trained; the step yields version + 1."""
    phase: Literal["warmup", "rl"]
    ranks: tuple[tuple[MicroBatch, ...], ...]
    token_counts: Mapping[Stream, int]
    """Global number of tokens of each stream: the denominators."""


@attrs.frozen(kw_only=True)
class TensorRecord:
    """Where one tensor of a manifest lies and what it must hash to."""

    name: str
    dtype: str
    """torch's name without the prefix, e.g. `float32`."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file or segment."""
    nbytes: int
    checksum: int
    """zlib.crc32 of the bytes."""


@attrs.frozen(kw_only=True)
class WeightPart:
    """The tensors of a version that one trainer rank sends."""

    location: str
    """Meaning belongs to the weight transport: a path, a segment's name, an address."""
    tensors: tuple[TensorRecord, ...]


@attrs.frozen(kw_only=True)
class Manifest:
    """One published policy version: enough for an engine to fetch and verify it."""

    version: int
    parts: tuple[WeightPart, ...]
    """By trainer rank; each tensor is in one of them, whole."""

    @classmethod
    def single(cls, *, version: int, location: str, tensors: tuple[TensorRecord, ...]) -> Manifest:
        """What one rank sends: a version, or its part of one."""
        return cls(version=version, parts=(WeightPart(location=location, tensors=tensors),))

    def only(self, wanted: Callable[[str], bool]) -> Manifest:
        """The same version without the tensors whose name is not wanted: who fetches it is sent the others."""
        return attrs.evolve(
            self,
            parts=tuple(
                attrs.evolve(part, tensors=tuple(tensor for tensor in part.tensors if wanted(tensor.name)))
                for part in self.parts
            ),
        )

    @property
    def tensors(self) -> tuple[TensorRecord, ...]:
        return tuple(tensor for part in self.parts for tensor in part.tensors)

    @property
    def where(self) -> str:
        """For people."""
        return ", ".join(part.location for part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


def as_tokens(ids: Sequence[int] | NDArray[Any]) -> Int32:
    """Token ids as the column type every wire carries."""
    return np.asarray(ids, dtype=np.int32)
