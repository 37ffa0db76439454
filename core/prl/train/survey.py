"""What a model is made of, as far as planning asks: parameters, kinds of layers, what they cost and remember.

Everything is read off the modules a plugin builds, on the meta device: no size is written down twice. Layers with equal
modules and shapes are one kind, surveyed once. The arithmetic of ranks and devices is `prl.plan`'s, which imports no
torch and calls this.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import torch
from torch import Tensor, nn

from prl.blocks.attention import GroupedQueryAttention
from prl.blocks.decoder import Layer
from prl.blocks.mamba2 import Mamba2
from prl.blocks.mla import MultiHeadLatentAttention
from prl.blocks.moe import MixtureOfExperts
from prl.compose.config import CostsSection
from prl.providers import NumberFormat, WeightMap
from prl.score import costs as score_costs
from prl.score.costs import Costs
from prl.train import flops
from prl.train.flops import Flops, Packed
from prl.train.trace import Footprint, LiveBytes, ends_footprint, head_footprint, layer_footprints, without_data

if TYPE_CHECKING:
    from prl.compose.compose import Composition

_Answer = TypeVar("_Answer")


@attrs.frozen(kw_only=True)
class ParameterInfo:
    """One parameter of the model."""

    name: str
    shape: tuple[int, ...]
    trained: bool
    layer: int | None
    """None: embedding, final norm, head."""
    expert: bool
    """Stacked over experts, which expert parallelism divides."""
    float32: bool
    """In every number format."""

    @property
    def size(self) -> int:
        size = 1
        for length in self.shape:
            size *= length
        return size


@attrs.frozen(kw_only=True)
class Remembered:
    """What one token leaves to later tokens of its document: what a cache holds, and context parallelism exchanges."""

    per_token: int = 0
    """Elements."""
    expanded: int = 0
    """Elements that training makes of them for each token it attends to."""
    state: int = 0
    """Elements per document, whatever its length, float32."""
    shortened: int = 0
    """Of `per_token`, those that only documents longer than the selection need."""

    def __add__(self, other: Remembered) -> Remembered:
        return Remembered(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in attrs.fields(Remembered)})


@attrs.frozen(kw_only=True)
class Routing:
    """The experts of a layer, as communication sees them."""

    experts: int
    per_token: int
    width: int
    """Elements of a token that travel to an expert, and back."""


@attrs.frozen(kw_only=True)
class Kind:
    """Layers that are alike."""

    name: str
    layers: tuple[int, ...]
    remembered: Remembered
    routing: Routing | None
    mixers: tuple[str, ...]
    """Their kinds, in order: what `trainer.recompute` chooses from."""
    selects: int
    """Tokens that attention sees of a longer document; 0: all."""


@attrs.frozen(kw_only=True, eq=False)
class Survey:
    """A model on the meta device, and what was asked of it."""

    model: nn.Module
    parameters: tuple[ParameterInfo, ...]
    kinds: tuple[Kind, ...]
    hidden_size: int
    device: str
    """Whose paths are followed: `cpu` or `cuda`."""
    dtype: torch.dtype
    """Of the computation."""
    _known: dict[Any, Any] = attrs.field(factory=dict, init=False, repr=False)
    """Answers that were given: many layouts ask the same."""

    @property
    def vocab_size(self) -> int:
        return len(self.model.head())  # type: ignore[operator]

    def layer_flops(self, lengths: tuple[int, ...]) -> list[Flops]:
        """Of one layer of every kind, for packed documents."""
        return self._once(lengths, lambda: [flops.count(self._layer(kind), Packed(lengths)) for kind in self.kinds])

    def recomputed_flops(self, lengths: tuple[int, ...], recompute: tuple[str, ...]) -> list[Flops]:
        """Of these mixers' second forward pass, in one layer of every kind."""

        def count() -> list[Flops]:
            packed = Packed(lengths)
            chosen = ([m for m in _mixers(self._layer(kind)) if _name(m) in recompute] for kind in self.kinds)
            return [Flops(recompute=flops.total(flops.count(m, packed) for m in each).forward) for each in chosen]

        return self._once((lengths, recompute), count)

    def head_flops(self, scored: int) -> Flops:
        """Of the logits of `scored` tokens."""
        return flops.head_flops(self.model.head(), scored)  # type: ignore[operator]

    def costs(self, longest: int, section: CostsSection) -> Costs:
        """Of training on a sequence of up to `longest` tokens: operations of every layer and of the head, in those of
        matrix products. UserError for a module with a matrix and no registered count."""

        def count() -> Costs:
            lengths = score_costs.points(longest)
            return Costs(tuple(lengths), tuple(self._cost(length, section) for length in lengths))

        return self._once((longest, section), count)

    def _cost(self, length: int, section: CostsSection) -> float:
        kinds = zip(self.kinds, self.layer_flops((length,)), strict=True)
        flops = sum((each.scaled(len(kind.layers)) for kind, each in kinds), self.head_flops(length))
        sides = (flops.forward, flops.backward, flops.recompute)
        return sum(n * getattr(section, work, 1.0) for side in sides for work, n in side.items())

    def footprints(
        self, lengths: tuple[int, ...], *, expert: int = 1, recompute: tuple[str, ...] = (), granularity: int = 512
    ) -> tuple[int, list[Footprint], Footprint]:
        """Bytes that layers share; the footprints of one layer of every kind and of what comes before and after all.

        `expert` ranks share the experts of a layer; mixers of the kinds in `recompute` are computed again.

        Attention over a selection is traced as attention over all earlier tokens by a fused kernel: the reference's
        masks [L, L] fit no accelerator at the lengths that are selected from (`prl.plan.memory` adds what a kernel
        for it keeps).
        """

        def trace() -> tuple[int, list[Footprint], Footprint]:
            with without_data(self.device, self.dtype):
                layers = [_traceable(self._layer(kind), expert, recompute) for kind in self.kinds]
                shared, each = layer_footprints(layers, lengths, hidden_size=self.hidden_size, granularity=granularity)
                ends = copy.copy(self.model)
                ends._modules = {**self.model._modules, "layers": nn.ModuleList()}
                return shared, each, ends_footprint(ends, lengths, granularity=granularity)

        return self._once((lengths, expert, recompute, granularity), trace)

    def head_footprint(self, rows: int, *, chunk: int, granularity: int = 512) -> Footprint:
        """Of the log-probabilities of `rows` tokens."""

        def trace() -> Footprint:
            with without_data(self.device, self.dtype):
                head = nn.Parameter(torch.empty(self.vocab_size, self.hidden_size))
                return head_footprint(head, rows, chunk=chunk, entropy=True, granularity=granularity)

        return self._once((rows, chunk, granularity), trace)

    def _once(self, asked: Any, answer: Callable[[], _Answer]) -> _Answer:
        if asked not in self._known:
            self._known[asked] = answer()
        known: _Answer = self._known[asked]
        return known

    def _layer(self, kind: Kind) -> nn.Module:
        return self.model.get_submodule(f"layers.{kind.layers[0]}")


def survey(build: Callable[[], nn.Module], *, device: str, dtype: torch.dtype, float32: Sequence[str] = ()) -> Survey:
    """Build a `prl.providers.LanguageModel` without data and look at it; `float32` are endings of names."""
    with without_data(device, dtype):
        model = build()
    experts = {f"{name}.experts." for name, module in model.named_modules() if isinstance(module, MixtureOfExperts)}
    parameters = tuple(
        ParameterInfo(
            name=name,
            shape=tuple(parameter.shape),
            trained=parameter.requires_grad,
            layer=int(name.split(".")[1]) if name.startswith("layers.") else None,
            expert=name.startswith(tuple(experts)),
            float32=name.endswith(tuple(float32)),
        )
        for name, parameter in model.named_parameters()
    )
    head: Tensor = model.head()  # type: ignore[operator]
    return Survey(
        model=model,
        parameters=parameters,
        kinds=_kinds(model),
        hidden_size=head.shape[1],
        device=device,
        dtype=dtype,
    )


def as_trained(composition: Composition, vocab_size: int) -> Survey:
    """The model of a run as its trainer computes it on a GPU."""
    run = composition.run
    build = functools.partial(composition.build, run.model, vocab_size)
    return survey(build, device="cuda", dtype=composition.build(run.quantization).train_dtype)


def _kinds(model: nn.Module) -> tuple[Kind, ...]:
    alike: dict[tuple[Any, ...], list[int]] = {}
    layers = list(model.get_submodule("layers").children())
    for index, layer in enumerate(layers):
        modules = tuple(type(module).__name__ for module in layer.modules())
        shapes = tuple((name, tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters())
        alike.setdefault((modules, shapes), []).append(index)
    return tuple(_kind(layers[indices[0]], tuple(indices)) for indices in alike.values())


def _kind(layer: nn.Module, indices: tuple[int, ...]) -> Kind:
    mixers = _mixers(layer)
    indexed = [m.indexer for m in layer.modules() if isinstance(m, MultiHeadLatentAttention) and m.indexer is not None]
    return Kind(
        name=" + ".join(_NAMES.get(type(mixer).__name__, type(mixer).__name__) for mixer in mixers),
        layers=indices,
        remembered=sum((remembered(mixer) for mixer in layer.modules()), Remembered()),
        routing=next((_routing(mixer) for mixer in mixers if isinstance(mixer, MixtureOfExperts)), None),
        mixers=tuple(_name(mixer) for mixer in mixers),
        selects=max((indexer.top_k for indexer in indexed), default=0),
    )


def _mixers(layer: nn.Module) -> list[nn.Module]:
    return [child for child in layer.children() if "Norm" not in type(child).__name__]


def _name(mixer: nn.Module) -> str:
    """As `trainer.recompute` calls it; empty where it has no name there."""
    return str(getattr(mixer, "kind", ""))


_NAMES = {
    "GroupedQueryAttention": "attention",
    "MultiHeadLatentAttention": "latent attention",
    "GatedMLP": "feed-forward",
    "MixtureOfExperts": "experts",
    "LatentMixtureOfExperts": "latent experts",
    "Mamba2": "Mamba-2",
}


def _routing(module: MixtureOfExperts) -> Routing:
    first: Tensor = next(module.experts.parameters())
    router = module.gate
    return Routing(experts=len(router.weight), per_token=router.experts_per_token, width=first.shape[2])


# --- what mixers remember ---------------------------------------------------------------------------------------------
@functools.singledispatch
def remembered(module: nn.Module) -> Remembered:
    """Of one mixer, without its children; register a function for a mixer of your own that looks at other tokens."""
    return Remembered()


@remembered.register
def _(module: GroupedQueryAttention) -> Remembered:
    elements = 2 * module.kv_heads * module.head_dim
    return Remembered(per_token=elements, expanded=elements)


@remembered.register
def _(module: MultiHeadLatentAttention) -> Remembered:
    """The latent travels and is cached; keys and values of every head are made of it (`expanded`)."""
    sizes, indexer = module.sizes, module.indexer
    latent = sizes.kv_rank + sizes.rope_dim
    index = 0 if indexer is None else getattr(indexer, "head_dim", 0)
    made = sizes.heads * (sizes.nope_dim + sizes.value_dim + 2 * sizes.qk_dim)  # projection, keys, padded values
    return Remembered(per_token=latent + index, expanded=made, shortened=index)


@remembered.register
def _(module: Mamba2) -> Remembered:
    sizes = module.sizes
    return Remembered(state=sizes.heads * sizes.head_dim * sizes.state + (sizes.kernel - 1) * sizes.convolved)


# --- layers that can be traced ----------------------------------------------------------------------------------------
class _Share(nn.Module):
    """The experts of one rank of several, given as many tokens as the rank sends out: a balanced router's."""

    def __init__(self, experts: nn.Module, ranks: int) -> None:
        super().__init__()
        self.held = copy.copy(experts)
        self.held._parameters = {
            name: nn.Parameter(torch.empty(len(p) // ranks, *p.shape[1:])) for name, p in experts.named_parameters()
        }
        self.count = len(next(self.held.parameters()))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [N, D] sorted by expert -> [N, D]"""
        outputs: Tensor = self.held(x, offsets[: self.count])
        return outputs


def _traceable(layer: nn.Module, expert: int, recompute: tuple[str, ...]) -> nn.Module:
    """A copy of the layer, over the same parameters, without selection, with one rank's experts, with mixers of some
    kinds computed again in the backward pass."""
    layer = copy.deepcopy(layer, {id(t): t for t in (*layer.parameters(), *layer.buffers())})
    if isinstance(layer, Layer):
        layer.recompute = frozenset(recompute)
    for module in list(layer.modules()):
        if isinstance(module, MultiHeadLatentAttention):
            module.indexer = None
        if isinstance(module, MixtureOfExperts) and expert > 1:
            module.experts = _Share(module.experts, expert)
    return layer


# --- what other parts of a run make of the parameters -----------------------------------------------------------------
def exported_bytes(
    survey: Survey, weight_map: WeightMap, number_format: NumberFormat, *, float32: Sequence[str]
) -> tuple[int, int]:
    """Bytes of one published version: of all but experts, and of experts. One layer of every kind is exported."""
    per_layer: dict[int | None, tuple[int, int]] = {None: (0, 0)}
    tensors = dict(survey.model.state_dict())
    experts = {p.name for p in survey.parameters if p.expert}
    shown = {kind.layers[0] for kind in survey.kinds}
    for name, tensor in tensors.items():
        layer = int(name.split(".")[1]) if name.startswith("layers.") else None
        if layer is not None and layer not in shown:
            continue
        dense, of_experts = per_layer.get(layer, (0, 0))
        size = sum(t.numel() * t.itemsize for t in _exported(name, tensor, weight_map, number_format, float32))
        per_layer[layer] = (dense, of_experts + size) if name in experts else (dense + size, of_experts)
    dense, of_experts = per_layer[None]
    for kind in survey.kinds:
        each = per_layer[kind.layers[0]]
        dense, of_experts = dense + len(kind.layers) * each[0], of_experts + len(kind.layers) * each[1]
    return dense, of_experts


def _exported(
    name: str, tensor: Tensor, weight_map: WeightMap, number_format: NumberFormat, float32: Sequence[str]
) -> Iterable[Tensor]:
    for hf_name, hf_tensor in weight_map.to_hf(name, tensor):
        if name.endswith(tuple(float32)):
            yield hf_tensor.float()
        else:
            yield from (exported for _, exported in number_format.export(hf_name, hf_tensor))


def optimizer_bytes(
    build: Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer], dtype: torch.dtype = torch.float32
) -> tuple[float, float]:
    """Bytes of optimizer state per byte of a parameter, and per parameter: from one step on two small parameters."""
    sizes = (64, 128)
    parameters = [(f"p{size}", nn.Parameter(torch.zeros(size, size, dtype=dtype))) for size in sizes]
    optimizer = build(parameters)
    for _, parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = [
        sum(value.nbytes for value in optimizer.state.get(p, {}).values() if isinstance(value, Tensor))
        for _, p in parameters
    ]
    small, large = (p.nbytes for _, p in parameters)
    per_byte = (held[1] - held[0]) / (large - small)
    return per_byte, held[0] - per_byte * small


def optimizer_working(
    build: Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer], dtype: torch.dtype = torch.float32
) -> float:
    """Bytes that exist during a step alone, per byte of all parameters: what grows with their number, as copies of all
    gradients do, and not what is made for one after the other."""
    peaks = []
    for count in (2, 3):  # of the one before, something may still exist
        parameters = [(f"p{index}", nn.Parameter(torch.zeros(64, 64, dtype=dtype))) for index in range(count)]
        optimizer = build(parameters)
        for _, parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # what it keeps exists from now on
        live = LiveBytes(1)
        kept = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
        live.adopt((*(p for _, p in parameters), *(p.grad for _, p in parameters if p.grad is not None), *kept))
        with live:
            optimizer.step()
        peaks.append(live.peak)
    return (peaks[1] - peaks[0]) / parameter.nbytes
