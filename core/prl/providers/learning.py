"""What a step learns by: losses, credit, optimizers, number formats, kernels. See `prl.providers`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import attrs

from prl.providers.provider import Provider, Ref

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from prl.types import Group


@attrs.frozen(kw_only=True)
class Loss(Provider):
    """A per-token loss over log-probabilities."""

    build: Ref
    """`(config) -> LossFunction`"""
    needs: frozenset[str] = frozenset()
    """Optional inputs the trainer must compute: `"entropy"`, `"ref_logprobs"`."""


class LossInputs(Protocol):
    """Columns of the packed tokens that are trained: `N` tokens (prompt tokens with no weight are left out)."""

    trainer_logprobs: Tensor  # [N] under the sampling temperature; carries the gradient
    engine_logprobs: Tensor  # [N]
    advantages: Tensor  # [N]
    weights: Tensor  # [N] this stream's weight; 0 = not in the stream
    sample_ids: Tensor  # [N] int64, which sample of the micro-batch each token belongs to
    sample_count: int
    staleness: Tensor  # [N] int64, version being trained - version that sampled the token
    entropy: Tensor | None  # [N], detached, when `needs` names it
    ref_logprobs: Tensor | None  # [N], when `needs` names it


@attrs.frozen(kw_only=True)
class LossOutput:
    """What a loss returns for one micro-batch."""

    loss: Tensor
    """[] the SUM over the stream's tokens of weight x per-token loss; core divides by the global token count."""
    metrics: Mapping[str, Tensor] = attrs.field(factory=dict)
    """[] detached SUMS; core divides by the same count."""


LossFunction: TypeAlias = "Callable[[LossInputs], LossOutput]"


@attrs.frozen(kw_only=True)
class Advantage(Provider):
    """Rewards of a group to per-token credit; runs in the controller, imports no torch."""

    build: Ref
    """`(config) -> AdvantageFunction`"""


AdvantageFunction: TypeAlias = "Callable[[Group], Sequence[float] | Sequence[Sequence[float]]]"
"""One number per rollout (spread over its sampled tokens), or one per token of each rollout.

One that learns from the groups it sees is a `StatefulAdvantage`.
"""


@runtime_checkable
class StatefulAdvantage(Protocol):
    """An `AdvantageFunction` with a memory, such as a running baseline: checkpoints carry it."""

    def __call__(self, group: Group) -> Sequence[float] | Sequence[Sequence[float]]: ...

    def state_dict(self) -> Mapping[str, Any]:
        """JSON-ready, and not changed by later calls."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@attrs.frozen(kw_only=True)
class Optimizer(Provider):
    """How parameters move. Learning-rate schedules are core's (`[schedule]`)."""

    build: Ref
    """`(config, named parameters, learning_rate) -> torch.optim.Optimizer`"""


@attrs.frozen(kw_only=True)
class Quantization(Provider):
    """Number formats: what the trainer computes in, what travels, what the engine computes in."""

    build: Ref
    """`(config) -> NumberFormat`"""


class NumberFormat(Protocol):
    train_dtype: torch.dtype
    serve_dtype: torch.dtype
    """What engines compute in, and what tensors that are not quantised travel as."""
    tolerance: float
    """Mean |trainer - engine logprob| this format may cost."""
    fake_quantization: bool
    """Whether the trainer's forward pass sees its weights as an engine will, and its backward pass does not."""

    def quantizes(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a Hugging Face tensor is among those that change their form; asked of what the model allows."""

    def export(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        """A Hugging Face tensor of the trainer -> what is sent to the engines, and stored. Takes meta tensors too."""

    def restore(self, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What `export` made, by Hugging Face name again: decoded when asked for, as exactly as float32 can.

        `export` of what was restored, unchanged, has the same bits. CheckpointError names a tensor that is malformed.
        """

    def rounded(self, tensor: Tensor) -> Tensor:
        """Matrices [..., O, I] that are quantised -> their values in float32 once exported and restored."""

    def declaration(self, kept: Sequence[str]) -> Mapping[str, Any] | None:
        """`quantization_config` of config.json, where the matrices `kept` are not quantised; None: there is none."""

    def reads(self, declared: Mapping[str, Any] | None) -> bool:
        """Whether `restore` understands a checkpoint whose config.json has this `quantization_config`, or none."""


@attrs.frozen(kw_only=True)
class Kernel(Provider):
    """Another way to compute one of the blocks' operations (`prl.blocks.kernels`)."""

    seam: str
    """The operation; a section of `[kernels]`."""
    build: Ref
    """`(config) -> function` that takes and returns what the seam's reference does. One that holds something of process
    groups has a method `close`, which all trainer ranks call before they leave the groups."""
    device: str | None = None
    """torch's type of the only device it runs on, such as `cuda`."""
