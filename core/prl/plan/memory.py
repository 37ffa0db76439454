"""Bytes of a trainer rank: what it holds, what a pass adds, and the most of each phase.

    held        its shards of parameters, gradients and optimizer state
    gathered    whole layers while they compute (two: one computes, the next arrives) and what is no layer throughout
    kept        activations from forward to backward
    working     what one layer, or the head, needs beside that

A single rank gathers nothing. Under full activation checkpointing a layer keeps its input alone and computes the rest
again; the largest layer's whole backward pass is then part of `working`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import attrs

from prl.plan.layout import Layout
from prl.plan.workload import part

if TYPE_CHECKING:
    from prl.train.survey import Kind, ParameterInfo, Survey
    from prl.train.trace import Footprint

Checkpointing: TypeAlias = Literal["none", "full"]

REDUCE_BYTES = 4
"""Gradients are summed over ranks in float32."""
_INDEX_BUFFER = 2**30
"""Of index scores at one time, by a kernel that selects block by block."""


@attrs.frozen(kw_only=True)
class Formats:
    """Bytes of an element, by what it is."""

    parameter: int
    compute: int
    optimizer: float
    """State per byte of a trained parameter."""
    optimizer_per_parameter: float
    serve: int


@attrs.frozen(kw_only=True)
class Settings:
    """What of a trainer decides about memory."""

    layout: Layout
    formats: Formats
    checkpointing: Checkpointing
    optimizer_offload: bool
    logprob_chunk: int


@attrs.frozen(kw_only=True)
class Memory:
    """Of one rank, in bytes."""

    parameters: int
    gradients: int
    optimizer: int
    """On the device; 0 when it is offloaded."""
    host: int
    """Optimizer state in host memory."""
    gathered: int
    kept: int
    working: int
    phases: Mapping[str, int]

    @property
    def peak(self) -> int:
        return max(self.phases.values())


def shard_size(parameter: ParameterInfo, layout: Layout, rank: int = 0) -> int:
    """Elements of a parameter that one rank holds, `rank` counted within its copy of the model.

    Rows are divided as `torch.chunk` does. Of experts a rank has its share; where there are fewer of those than ranks
    that hold them, the next dimension is divided.
    """
    shape = list(parameter.shape)
    if not parameter.expert:
        return _part(shape, 0, layout.sharded_over, rank)
    shape[0] //= layout.expert
    ranks = layout.experts_over
    return _part(shape, 0 if ranks <= shape[0] else 1, ranks, rank // layout.expert)


def _part(shape: Sequence[int], dimension: int, parts: int, index: int) -> int:
    size = 1
    for d, length in enumerate(shape):
        if d == dimension:
            rows = -(-length // parts)
            length = max(0, min(rows, length - index * rows))
        size *= length
    return size


def held(parameters: Sequence[ParameterInfo], settings: Settings, rank: int = 0) -> tuple[int, int, int]:
    """Bytes of the shards of parameters, gradients and optimizer state."""
    formats = settings.formats
    in_all = in_gradients = 0
    state = 0.0
    for parameter in parameters:
        size = shard_size(parameter, settings.layout, rank) * (4 if parameter.float32 else formats.parameter)
        in_all += size
        if parameter.trained:
            in_gradients += size
            state += formats.optimizer * size + formats.optimizer_per_parameter
    return in_all, in_gradients, round(state)


def memory(survey: Survey, settings: Settings, micro_batch: Sequence[int], *, sampled: float) -> Memory:
    """Of rank 0 when the heaviest micro-batch has documents of these lengths, of which a share is scored."""
    parameters, gradients, state = held(survey.parameters, settings)
    optimizer = 0 if settings.optimizer_offload else state
    lengths = part(micro_batch, settings.layout.context)
    tokens = sum(lengths)
    row = tokens * survey.hidden_size * settings.formats.compute
    shared, footprints = survey.footprints(lengths, expert=settings.layout.expert)
    layers = [
        _with_context(footprint, kind, settings, micro_batch)
        for kind, footprint in zip(survey.kinds, footprints, strict=True)
    ]
    head = survey.head_footprint(max(1, round(tokens * sampled)), chunk=settings.logprob_chunk)
    units = _units(survey, settings)
    kept = shared + sum(
        len(kind.layers) * _kept(f, row, settings) for kind, f in zip(survey.kinds, layers, strict=True)
    )
    base = parameters + gradients + optimizer + kept + units.root
    if settings.checkpointing == "full":
        working = max(max(f.forward_peak, f.backward_peak) for f in layers)
    else:
        working = max(f.backward_peak - f.saved for f in layers)
    phases = {
        "forward": base + units.gathered + max(f.forward_peak - f.saved for f in layers),
        "head": base + row + head.backward_peak + units.head_gradient,
        "backward": base + units.gathered + units.gradients + units.head_gradient + working,
        "optimizer": parameters + gradients + optimizer,
    }
    return Memory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        host=state if settings.optimizer_offload else 0,
        gathered=units.root + units.gathered + units.gradients + units.head_gradient,
        kept=kept,
        working=working,
        phases=phases,
    )


def _kept(footprint: Footprint, row: int, settings: Settings) -> int:
    """From one layer's forward to its backward."""
    if settings.checkpointing == "full":
        return row
    return footprint.saved + (row if footprint.keeps_input else 0)


@attrs.frozen
class _Units:
    """Whole parameters that a rank sees at one time, and their gradients, before they are shards."""

    root: int = 0
    gathered: int = 0
    gradients: int = 0
    head_gradient: int = 0


def _units(survey: Survey, settings: Settings) -> _Units:
    layout, formats = settings.layout, settings.formats
    root = sum(p.size for p in survey.parameters if p.layer is None)
    head = survey.vocab_size * survey.hidden_size
    if layout.ranks == 1:  # the model's own tensors, counted as held
        return _Units()
    largest = max(layer_sizes(survey, layout).values())
    trained = max(layer_sizes(survey, layout, trained=True).values())
    each_gradient = formats.compute + REDUCE_BYTES
    return _Units(
        root=root * formats.compute,
        gathered=2 * largest * formats.compute,
        gradients=trained * each_gradient,
        head_gradient=head * each_gradient,
    )


def layer_sizes(survey: Survey, layout: Layout, *, trained: bool = False) -> dict[int, int]:
    """Layer -> elements a rank needs whole to compute it; `trained`: only those with a gradient."""
    sizes: dict[int, int] = {}
    for p in survey.parameters:
        if p.layer is not None and (p.trained or not trained):
            sizes[p.layer] = sizes.get(p.layer, 0) + p.size // (layout.expert if p.expert else 1)
    return sizes


def _with_context(footprint: Footprint, kind: Kind, settings: Settings, micro_batch: Sequence[int]) -> Footprint:
    """With what attention adds that the trace does not see: the selection, and earlier tokens on other ranks."""
    tokens = sum(micro_batch)
    local = -(-tokens // settings.layout.context)
    selecting = bool(kind.selects) and max(micro_batch, default=0) > kind.selects
    remembered = kind.remembered
    width = remembered.per_token + (0 if selecting else remembered.expanded)
    gathered = (tokens - local) * width * settings.formats.compute if settings.layout.context > 1 else 0
    selection = local * kind.selects * 4 if selecting else 0
    saved = gathered + selection
    buffer = _INDEX_BUFFER if selecting else 0
    return attrs.evolve(
        footprint,
        saved=footprint.saved + saved,
        forward_peak=footprint.forward_peak + saved + buffer,
        backward_peak=footprint.backward_peak + saved + gathered,
    )
