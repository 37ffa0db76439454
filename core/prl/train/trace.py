"""What a forward and backward pass keeps and needs at most, learnt by running it without data.

The blocks' own code runs on torch's meta device, whose tensors have shapes and no memory, so a layer of a trillion
parameters takes milliseconds and what is learnt follows the code. Every tensor that an operation makes is counted from
its birth to its death. Meta tensors take the paths of an accelerator; the paths of a CPU are followed by fake tensors.
Called by `prl.train.survey`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prl.blocks.context import Context
from prl.train.logprobs import token_scores

_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "convolution", "convolution_backward")
"""Operations whose time is that of their FLOPs."""


@attrs.frozen(kw_only=True)
class Footprint:
    """Bytes of one forward and backward."""

    saved: int
    """Kept from the forward pass for the backward, without the input, parameters and what layers share."""
    keeps_input: bool
    """The input is kept too."""
    forward_peak: int
    """Most that exists at one time in the forward pass beyond input, parameters and what layers share."""
    backward_peak: int
    """The same in the backward pass, with what was saved and the gradients of output and input. Gradients of parameters
    count until they are whole: they outlive the pass, and are somebody else's to count."""
    sharded_peak: int
    """The same with gradients of parameters that are whole: where ranks divide parameters, they wait for the layer's
    others before they are summed."""
    traffic: int
    """Read and written by operations that are no matrix products, forward and backward."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations make while they live, each rounded up as an allocator would."""

    def __init__(self, granularity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.traffic = 0
        self.apart = self.peak_with_apart = 0
        """Bytes that were taken out of the count, and the most there was with them."""
        self._granularity = granularity
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._adopted: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _without_data(func, args, kwargs or {})
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        born = sum(self._born(t) for t in made)
        if born and not _is_product(func):
            read = (t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor))
            self.traffic += sum(t.numel() * t.itemsize for t in (*made, *read))
        return out

    def _born(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return False
        self._known.add(storage)
        size = -(-storage.nbytes() // self._granularity) * self._granularity
        self.now += size
        self.peak = max(self.peak, self.now)
        self.peak_with_apart = max(self.peak_with_apart, self.now + self.apart)
        weakref.finalize(storage, self._died, size).atexit = False
        return True

    def _died(self, size: int) -> None:
        self.now -= size

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """These exist already and are not counted."""
        self._adopted += [tensor.untyped_storage() for tensor in tensors]
        self._known.update(self._adopted)


def _without_data(func: Any, args: Any, kwargs: Any) -> Any:
    """What the operation makes. torch knows the shapes of grouped products in bfloat16 alone, which are all types'."""
    if func is not torch.ops.aten._grouped_mm.default or args[0].dtype is torch.bfloat16:
        return func(*args, **kwargs)
    factors = (factor.to(torch.bfloat16) for factor in args[:2])
    return func(*factors, *args[2:], **kwargs).to(args[0].dtype)


def _is_product(func: Any) -> bool:
    name = func.overloadpacket.__name__
    return name in _PRODUCTS or "varlen_attn" in name or "attention" in name


@contextmanager
def without_data(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Inside, new tensors have no memory and by default this dtype; they would be on `device`, `cpu` or another."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _fake_tensors() if device == "cpu" else torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


@cache
def _fake_tensors() -> AbstractContextManager[Any]:
    """One mode for all: tensors of two do not mix."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second to import

    return FakeTensorMode()  # type: ignore[no-untyped-call, unused-ignore]


def layer_footprints(
    layers: Sequence[nn.Module], lengths: Sequence[int], *, hidden_size: int, granularity: int
) -> tuple[int, list[Footprint]]:
    """Bytes of what layers share in a pass (tables, layouts), and the footprint of each for packed documents.

    Inside `without_data`, with the layers' parameters made there.
    """
    context = _packed(lengths)
    x = torch.empty(sum(lengths), hidden_size).requires_grad_()
    sharing = LiveBytes(granularity)
    sharing.adopt((x, *(parameter for layer in layers for parameter in layer.parameters())))
    with sharing:
        for layer in layers:
            layer(x, context, 0)
    footprints = [
        footprint(partial(layer, x, context, 0), layer.parameters(), x, granularity=granularity) for layer in layers
    ]
    return sharing.now, footprints


def _packed(lengths: Sequence[int]) -> Context:
    positions = torch.zeros(sum(lengths), dtype=torch.int64)
    # A kernel for one document at a time keeps as much as the one for all, which has a form without data.
    memo = {"long": False}
    return Context(lengths=tuple(lengths), positions=positions, longest=max(lengths, default=0), memo=memo)


def ends_footprint(model: nn.Module, lengths: Sequence[int], *, granularity: int) -> Footprint:
    """Of what comes before and after the layers of a model, whose `layers` are gone; inside `without_data`."""
    context, tokens = _packed(lengths), torch.zeros(sum(lengths), dtype=torch.int64)
    hidden: Callable[[Tensor, Context], Tensor] = cast("Any", model).hidden
    run = partial(hidden, tokens, context)
    return footprint(run, model.parameters(), torch.empty(0), tokens, context.positions, granularity=granularity)


def head_footprint(head: nn.Parameter, rows: int, *, chunk: int, entropy: bool, granularity: int) -> Footprint:
    """Of the log-probabilities of `rows` tokens; inside `without_data`."""
    hidden = torch.empty(rows, head.shape[1]).requires_grad_()
    targets, temperatures = torch.zeros(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.float32)

    def score() -> Tensor:
        scores = token_scores(hidden, head, targets=targets, temperatures=temperatures, chunk=chunk, entropy=entropy)
        return scores.logprobs

    return footprint(score, [head], hidden, targets, temperatures, granularity=granularity)


def footprint(
    run: Callable[[], Tensor], parameters: Iterable[Tensor], x: Tensor, *inputs: Tensor, granularity: int
) -> Footprint:
    """Of `run`, which makes one tensor out of `x` and further `inputs`, and of its backward pass."""
    live = LiveBytes(granularity)
    held = list(parameters)
    live.adopt((x, *inputs, *held))

    def set_apart(parameter: Tensor) -> None:
        if parameter.grad is not None:
            live.apart += parameter.grad.untyped_storage().nbytes()
        parameter.grad = None

    hooks: list[Any] = [
        p.register_post_accumulate_grad_hook(set_apart)  # type: ignore[no-untyped-call]
        for p in held
        if p.requires_grad
    ]
    kept: list[bool] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage()._cdata == x.untyped_storage()._cdata)
        return tensor

    with live:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            out = run()
        made, saved, forward_peak = out.untyped_storage().nbytes(), live.now, live.peak
        live.peak = live.peak_with_apart = live.now
        out.backward(torch.empty_like(out))  # type: ignore[no-untyped-call]
    for hook in hooks:
        hook.remove()
    x.grad = None
    return Footprint(
        saved=saved - made,
        keeps_input=any(kept),
        forward_peak=forward_peak,
        backward_peak=live.peak - made,
        sharded_peak=live.peak_with_apart - made,
        traffic=live.traffic,
    )
