"""DeepEP: tokens to the ranks of their experts, and back, summed.

A token that several experts of one rank were chosen for travels once, and what they make of it is weighted and summed
before it travels back: fewer bytes than an all-to-all of every choice. Needs DeepEP 2 (`deep_ep.ElasticBuffer`), an
NVIDIA GPU of the Hopper generation or newer, and bfloat16.

DeepEP's two operations are each other's gradients. Tokens arrive in another order every time, so experts are given them
in the order of their ranks and places there: what is computed again for a backward pass must meet the gradients of what
was computed first.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist
from prl.errors import RunError
from prl.score.pack import round_up
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

_HOPPER = (9, 0)
_WIDTH = 256
"""DeepEP's combining kernel reads tokens in steps of so many bfloat16 numbers."""
_TOOLS = ("nvcc", "cuobjdump")
"""DeepEP compiles its kernels when they are first used."""
_SMS = 20
"""Processors of a GPU that exchange tokens where DeepEP cannot tell how fast the network is."""
_buffers: dict[tuple[ProcessGroup, int, int], tuple[Any, int]] = {}
"""Of a group, a width of tokens and a number of choices: DeepEP's buffer, and the tokens of a rank it has room for."""


def missing() -> str:
    """What DeepEP needs and this process does not have; empty: nothing."""
    if find_spec("deep_ep") is None:
        return "the module deep_ep cannot be imported: install DeepEP 2 (docs/meshes.md says how)"
    try:
        module = import_module("deep_ep")
    except Exception as error:  # it checks its surroundings by assertions: another NCCL, no CUDA toolkit
        return f"the module deep_ep cannot be imported: {' '.join(str(error).split()) or type(error).__name__}"
    if not hasattr(module, "ElasticBuffer"):
        return "the installed deep_ep has no ElasticBuffer: it needs version 2 or newer"
    toolkit = Path(module.find_cuda_home())
    if absent := [tool for tool in _TOOLS if not (toolkit / "bin" / tool).is_file()]:
        return f"DeepEP compiles kernels with the CUDA toolkit, and {toolkit} has no {' and no '.join(absent)}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    found = torch.cuda.get_device_capability()
    if found < _HOPPER:
        return (
            f"{torch.cuda.get_device_name()} is of compute capability {found[0]}.{found[1]}, and 9.0 (Hopper) is needed"
        )
    return ""


def check(x: Tensor) -> None:
    """RunError where DeepEP cannot send such tokens x [T, D]."""
    if x.dtype is not torch.bfloat16:
        raise RunError(f"kernel 'deepep' sends bfloat16, and the layer computes in {x.dtype}")
    if x.shape[1] % _WIDTH:
        raise RunError(
            f"kernel 'deepep' sends tokens of a multiple of {_WIDTH} numbers, and the layer's have {x.shape[1]}; "
            "leave kernels.dispatch out, and tokens travel by all-to-all"
        )


@attrs.frozen(kw_only=True, eq=False)
class Order:
    """Of N rows, one for each expert of this rank and token it was chosen for: by expert, then by where they come from.

    Kept as it is for the backward pass, whatever is computed again in between: it belongs to what arrived.
    """

    token: Tensor
    """[N] int64, of the R tokens that arrived the one each row is of."""
    choice: Tensor
    """[N] int64, its place in all choices of those tokens [R * K]."""
    by_token: Tensor
    """[N] int64, the rows in the order of their tokens."""
    starts: Tensor
    """[R] int64, of each token the place of its first row in `by_token`."""


@attrs.frozen(kw_only=True, eq=False)
class Arrived:
    """What `send` leaves for `back`."""

    buffer: Any
    handle: Any
    """DeepEP's."""
    order: Order
    shares: Tensor
    """[N] float32, the weight of each row's expert."""


def send(
    x: Tensor, weights: Tensor, chosen: Tensor, group: ProcessGroup, experts: int
) -> tuple[Tensor, Tensor, Arrived]:
    """x [T, D] bfloat16, weights [T, K] float32 and chosen of all `experts` [T, K] int64 -> what this rank's experts
    were sent [N, D] sorted by expert, how many each [E] int64, and what `back` asks for."""
    most = torch.tensor(len(x), device=x.device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    buffer, room = _buffer(group, x.shape[1], chosen.shape[1], int(most))
    tokens, shares, places, handle = _Dispatch.apply(x, weights.float(), chosen, buffer, experts, room)  # type: ignore[no-untyped-call]
    here, counts = places >= 0, handle.num_recv_tokens_per_expert_list
    key = places * (group.size() * room) + handle.recv_src_metadata[:, :1]
    choice = key.masked_fill(~here, torch.iinfo(key.dtype).max).flatten().argsort()[: sum(counts)]
    token, per_token = choice // chosen.shape[1], here.sum(1)
    order = Order(
        token=token, choice=choice, by_token=token.argsort(stable=True), starts=per_token.cumsum(0) - per_token
    )
    rows, shares = _Copy.apply(tokens, shares, order)  # type: ignore[no-untyped-call]
    return (
        rows,
        torch.tensor(counts, device=x.device),
        Arrived(buffer=buffer, handle=handle, order=order, shares=shares),
    )


def back(outputs: Tensor, arrived: Arrived) -> Tensor:
    """outputs [N, D] of this rank's experts -> the weighted sum of the chosen experts' outputs [T, D]."""
    summed = _Sum.apply(outputs, arrived.shares, arrived.order)  # type: ignore[no-untyped-call]
    combined: Tensor = _Combine.apply(summed, arrived.buffer, arrived.handle)  # type: ignore[no-untyped-call]
    return combined


def close() -> None:
    """Give the buffers back; every rank must, before its process groups end."""
    for buffer, _ in _buffers.values():
        buffer.destroy()
    _buffers.clear()


def _buffer(group: ProcessGroup, width: int, choices: int, most: int) -> tuple[Any, int]:
    """DeepEP's buffer, and the tokens of a rank it has room for, on all ranks alike: kernels are compiled for each
    room, so the largest so far does for fewer tokens.

    A buffer is made anew only for more tokens than ever, which no layer has that waits for its backward pass.
    """
    key = group, width, choices
    buffer, room = _buffers.get(key, (None, 0))
    if most > room:
        if int(os.environ.get("LOCAL_WORLD_SIZE", "0")) == dist.get_world_size():
            # All ranks are on this host: without it DeepEP asks NCCL for a network, which nothing would use.
            os.environ.setdefault("EP_DISABLE_GIN", "1")
        if buffer is not None:
            buffer.destroy()
        room = round_up(most)
        buffer = import_module("deep_ep").ElasticBuffer(
            group, num_max_tokens_per_rank=room, hidden=width, num_topk=choices, explicitly_destroy=True
        )
        _buffers[key] = buffer, room
    return buffer, room


def _processors(buffer: Any, experts: int, choices: int) -> int:
    try:
        return int(buffer.get_theoretical_num_sms(experts, choices))
    except ZeroDivisionError:
        return _SMS


class _Dispatch(torch.autograd.Function):
    """Tokens, with the weights of their choices, to every rank that has experts of their choice."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, chosen: Tensor, buffer: Any, experts: int, room: int
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        """-> tokens [R, D] in any order, weights [R, K], which of this rank's experts [R, K] or -1, DeepEP's handle."""
        tokens, places, shares, handle, _ = buffer.dispatch(
            x.contiguous(),
            topk_idx=chosen.contiguous(),
            topk_weights=weights.contiguous(),
            num_experts=experts,
            num_max_tokens_per_rank=room,
            num_sms=_processors(buffer, experts, chosen.shape[1]),
        )
        ctx.mark_non_differentiable(places)
        ctx.buffer, ctx.handle = buffer, handle
        return tokens, shares, places, handle

    @staticmethod
    def backward(ctx: Any, tokens: Tensor, shares: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weights, _ = ctx.buffer.combine(tokens.contiguous(), handle=ctx.handle, topk_weights=shares.contiguous())
        return x, weights, None, None, None, None


class _Combine(torch.autograd.Function):
    """The sums of tokens [R, D] where they came from [T, D]."""

    @staticmethod
    def forward(ctx: Any, summed: Tensor, buffer: Any, handle: Any) -> Tensor:
        ctx.buffer, ctx.handle = buffer, handle
        combined: Tensor = buffer.combine(summed, handle=handle)[0]
        return combined

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        handle = ctx.handle
        return ctx.buffer.dispatch(grad.contiguous(), handle=handle, num_sms=handle.num_sms)[0], None, None


class _Copy(torch.autograd.Function):
    """One row for each expert of a token; the gradients of copies are added in the order of the experts."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, shares: Tensor, order: Order) -> tuple[Tensor, Tensor]:
        """tokens [R, D] and shares [R, K] -> rows [N, D] and the share of each [N]."""
        ctx.order, ctx.shape = order, shares.shape
        return tokens.index_select(0, order.token), shares.flatten().index_select(0, order.choice)

    @staticmethod
    def backward(ctx: Any, rows: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, None]:
        every = shares.new_zeros(ctx.shape.numel()).index_copy(0, ctx.order.choice, shares)
        return _bags(rows, ctx.order), every.view(ctx.shape), None


class _Sum(torch.autograd.Function):
    """outputs [N, D], shares [N] -> the weighted sum of each token's rows [R, D]."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, shares: Tensor, order: Order) -> Tensor:
        ctx.save_for_backward(outputs, shares)
        ctx.order = order
        return _bags(outputs, order, shares.index_select(0, order.by_token).to(outputs.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        outputs, shares = ctx.saved_tensors
        rows = grad.index_select(0, ctx.order.token)
        return rows * shares[:, None].to(rows.dtype), (rows * outputs).sum(-1, dtype=shares.dtype), None


def _bags(rows: Tensor, order: Order, weights: Tensor | None = None) -> Tensor:
    """rows [N, D], weights [N] by token -> the sum of each token's rows [R, D], accumulated in float32."""
    if not len(rows):
        return rows.new_zeros(len(order.starts), rows.shape[1])
    return functional.embedding_bag(order.by_token, rows, order.starts, mode="sum", per_sample_weights=weights)
