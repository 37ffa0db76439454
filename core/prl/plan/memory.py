"""Bytes of a trainer rank: what it holds, what a pass adds, and the most of each phase.

    held        its shards of parameters, gradients and optimizer state
    gathered    whole layers while they compute (two: one computes, the next arrives) and what is no layer throughout
    kept        activations from forward to backward
    working     what one layer, or the head, needs beside that

A single rank gathers nothing. Under full activation checkpointing a layer keeps its input alone and computes the rest
again; the largest layer's whole backward pass is then part of `working`. Under selective checkpointing its parts do, as
they were traced. Those inputs may wait in host memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import attrs

from prl.plan.layout import experts_over, sharded_over
from prl.plan.workload import part
from prl.train.layout import Layout

if TYPE_CHECKING:
    from prl.train.survey import Kind, ParameterInfo, Survey
    from prl.train.trace import Footprint

Checkpointing: TypeAlias = Literal["none", "selective", "full"]

_ON_THE_WAY = 2
"""Layers' inputs that are on the device although they wait in host memory: one is computed with, one comes or goes."""
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
    optimizer_working: float
    """What a step makes beside its state, per byte of a gradient."""
    serve: int


@attrs.frozen(kw_only=True)
class Settings:
    """What of a trainer decides about memory."""

    layout: Layout
    formats: Formats
    checkpointing: Checkpointing
    recompute: tuple[str, ...] = ()
    """Kinds of mixers, under selective checkpointing."""
    optimizer_offload: bool
    activation_offload: bool = False
    """Inputs of what is computed again in host memory."""
    logprob_chunk: int

    def repeats(self, *mixers: str) -> bool:
        """Whether one of these kinds of mixers is computed again in the backward pass."""
        return self.checkpointing == "full" or not {*mixers}.isdisjoint(self.recompute)

    def checkpoints(self, kind: Kind) -> int:
        """Inputs that such a layer keeps to compute from again."""
        return 1 if self.checkpointing == "full" else sum(mixer in self.recompute for mixer in kind.mixers)


@attrs.frozen(kw_only=True)
class Memory:
    """Of one rank, in bytes."""

    parameters: int
    gradients: int
    optimizer: int
    """On the device; 0 when it is offloaded."""
    host: int
    """Optimizer state in host memory."""
    host_activations: int
    """Inputs in host memory of what is computed again."""
    gathered: int
    kept: int
    scored: int
    """What the head keeps: the hidden states of scored tokens."""
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
        return _part(shape, 0, sharded_over(layout), rank)
    shape[0] //= layout.expert
    ranks = experts_over(layout)
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


def memory(
    survey: Survey,
    settings: Settings,
    micro_batch: Sequence[int],
    *,
    sampled: float,
    accumulating: bool = True,
    granularity: int = 512,
) -> Memory:
    """Of rank 0 when the heaviest micro-batch has documents of these lengths, of which a share is scored.

    `accumulating`: there were micro-batches before it, so gradients exist from its beginning.
    """
    parameters, gradients, state = held(survey.parameters, settings)
    optimizer = 0 if settings.optimizer_offload else state
    lengths = part(micro_batch, settings.layout.context)
    tokens = sum(lengths)
    row = tokens * survey.hidden_size * settings.formats.compute
    scored = max(1, round(tokens * sampled))
    shared, footprints, ends = survey.footprints(
        lengths, expert=settings.layout.expert, recompute=settings.recompute, granularity=granularity
    )
    layers = [
        _with_context(footprint, kind, settings, micro_batch)
        for kind, footprint in zip(survey.kinds, footprints, strict=True)
    ]
    head = survey.head_footprint(scored, chunk=settings.logprob_chunk, granularity=granularity)
    units = _units(survey, settings)
    each_kept = [_kept(kind, footprint, row, settings) for kind, footprint in zip(survey.kinds, layers, strict=True)]
    kept = shared + ends.saved + sum(len(k.layers) * n for k, n in zip(survey.kinds, each_kept, strict=True))
    away = activations_away(survey, settings, tokens)
    if away:
        kept += _ON_THE_WAY * row
    static = parameters + optimizer + units.root + (gradients if accumulating else 0)
    chosen = row * scored // tokens  # hidden states of the scored tokens, copied together
    phases = {
        "forward": static + kept + units.gathered + max(f.forward_peak - f.saved for f in layers),
        "head": static + kept + row + chosen + max(head.forward_peak, head.backward_peak + units.head_gradient),
        "backward": static + _backward(survey, settings, units, layers, each_kept, kept, grow=not accumulating),
        # State that waits in host memory is on the device while parameters move.
        "optimizer": parameters + gradients + state + round(settings.formats.optimizer_working * gradients),
    }
    return Memory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        host=state if settings.optimizer_offload else 0,
        host_activations=away,
        gathered=units.root + units.gathered + units.gradients + units.head_gradient,
        kept=kept,
        scored=chosen + head.saved,
        working=max(_working(footprint, settings) for footprint in layers),
        phases=phases,
    )


def _kept(kind: Kind, footprint: Footprint, row: int, settings: Settings) -> int:
    """From one layer's forward to its backward."""
    away = settings.checkpoints(kind) * row if settings.activation_offload else 0
    if settings.checkpointing == "full":
        return row - away
    return footprint.saved + (row if footprint.keeps_input else 0) - away


def activations_away(survey: Survey, settings: Settings, tokens: int) -> int:
    """Bytes of activations in host memory when the forward pass of a rank's `tokens` tokens is done."""
    if not settings.activation_offload:
        return 0
    inputs = sum(len(kind.layers) * settings.checkpoints(kind) for kind in survey.kinds)
    return inputs * tokens * survey.hidden_size * settings.formats.compute


def _working(footprint: Footprint, settings: Settings) -> int:
    """What a layer's backward pass needs beside what was kept for it."""
    peak = footprint.backward_peak if settings.layout.ranks == 1 else footprint.sharded_peak
    if settings.checkpointing == "full":
        return max(footprint.forward_peak, peak)
    return peak - footprint.saved


def _backward(
    survey: Survey,
    settings: Settings,
    units: _Units,
    layers: Sequence[Footprint],
    each_kept: Sequence[int],
    kept: int,
    *,
    grow: bool,
) -> int:
    """The most that activations, whole layers, and gradients that `grow` meanwhile, come to: the last layer first.

    While a layer computes, the parameters of the one that follows arrive, and the gradients of the one before are on
    their way to other ranks in the parameters' dtype. What is no layer has its gradients whole until the end.
    """
    formats = settings.formats
    kind_of = {index: number for number, kind in enumerate(survey.kinds) for index in kind.layers}
    gradients: dict[int | None, int] = {}
    for p in survey.parameters:
        size = shard_size(p, settings.layout) * settings.formats.parameter if p.trained and grow else 0
        gradients[p.layer] = gradients.get(p.layer, 0) + size
    at_the_end = gradients.get(None, 0) + units.root_gradient
    now, most = kept + (units.head_gradient if units.sizes else gradients.get(None, 0)), 0
    for index in sorted(kind_of, reverse=True):
        number = kind_of[index]
        whole = (units.sizes.get(index, 0) + units.sizes.get(index - 1, 0)) * formats.compute
        leaving = units.trained.get(index + 1, 0) * formats.parameter
        most = max(most, now + whole + leaving + _working(layers[number], settings))
        now += gradients.get(index, 0) - each_kept[number]
    return max(most, now + (at_the_end if units.sizes else 0))


@attrs.frozen
class _Units:
    """Whole parameters that a rank sees at one time, and their gradients, before they are shards."""

    root: int = 0
    gathered: int = 0
    gradients: int = 0
    head_gradient: int = 0
    root_gradient: int = 0
    """Of all that is no layer, with what is summed over ranks."""
    sizes: Mapping[int, int] = attrs.field(factory=dict)
    """Layer -> elements; empty for a single rank."""
    trained: Mapping[int, int] = attrs.field(factory=dict)
    """Those with a gradient."""


def _units(survey: Survey, settings: Settings) -> _Units:
    layout, formats = settings.layout, settings.formats
    root = sum(p.size for p in survey.parameters if p.layer is None)
    head = survey.vocab_size * survey.hidden_size
    if layout.ranks == 1:  # the model's own tensors, counted as held
        return _Units()
    sizes, trained = layer_sizes(survey, layout), layer_sizes(survey, layout, trained=True)
    return _Units(
        root=root * formats.compute,
        gathered=2 * max(sizes.values()) * formats.compute,
        gradients=max(trained.values()) * formats.parameter,
        head_gradient=head * formats.compute,
        root_gradient=root * (formats.compute + formats.parameter),
        sizes=sizes,
        trained=trained,
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
        sharded_peak=footprint.sharded_peak + saved + gathered,
    )
