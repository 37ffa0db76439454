"""Tokens to experts on two GPUs: the plugin `deepep` beside the all-to-all.

    python -m torch.distributed.run --nproc-per-node 2 -m benchmarks.deepep_gpu --out DIR     two Hopper GPUs, DeepEP 2
    ... --smoke                                      two CPUs, tiny sizes, with the stand-in for DeepEP of the tests

From the root of a checkout with torch, torchtitan, numpy, attrs and pluggy. Parts (--only), each written to
DIR/PART.json as it goes:

    links    what the GPUs' link carries: an all-reduce and an all-to-all of a gigabyte
    values   a mixture's outputs and gradients by both, beside the same in float32; the exit code is 1 when the two ways
             are further apart than BOUND
    speed    forward and backward at GLM-5's width, top-8 of 64 experts: the exchange alone (experts that do nothing)
             and the whole layer; also with torchtitan's functions around the same kernels, which copy and sum otherwise
    kernels  the kernels that take longest in the exchange alone
    sms      the exchange alone, by processors that DeepEP is given
    steps    a toy mixture's gradients and training steps by both, on meshes that divide its experts, with and without
             computing layers again
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist
from prl.blocks.context import Context
from prl.blocks.kernels import SEAMS
from prl.blocks.moe import Experts, MixtureOfExperts, RunExperts, SoftmaxRouter
from prl.train.layout import Layout
from prl.train.parallel.experts import AllToAll
from prl_deepep import DeepEpConfig, exchange
from prl_deepep.kernel import build, dispatch
from torch import Tensor, nn

from benchmarks.deepep_steps import steps
from tests.plugins.deepep_program import stand_in

BOUND = 1e-2
"""Of a relative difference: bfloat16 keeps 8 bits."""
CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if CUDA else torch.float32
DEVICE = "cuda" if CUDA else "cpu"


@attrs.frozen(kw_only=True)
class Sizes:
    hidden: int
    inner: int
    experts: int
    choices: int
    tokens: tuple[int, ...]
    """Of each rank, the most first: kernels are compiled for them, and do for fewer."""


GLM = Sizes(hidden=6144, inner=2048, experts=64, choices=8, tokens=(8192, 4096))
SMALL = Sizes(hidden=1024, inner=512, experts=16, choices=4, tokens=(1024,))
TOY = Sizes(hidden=32, inner=16, experts=8, choices=2, tokens=(24, 12))


# --- the two ways -----------------------------------------------------------------------------------------------------
def torchtitan(x: Tensor, weights: Tensor, chosen: Tensor, experts: nn.Module, run: RunExperts, count: int) -> Tensor:
    """As `prl.blocks.moe.dispatch`, by torchtitan's functions."""
    titan, group = import_module("torchtitan.distributed.deepep.deepep"), run.group
    assert group is not None
    room, choices = max(GLM.tokens), chosen.shape[1]
    titan.get_buffer(group, hidden=x.shape[1], num_max_tokens_per_rank=room, num_topk=choices)
    rows, counts, state = titan.dispatch_tokens(
        x, chosen, weights, count // group.size(), count, num_tokens_per_rank=room
    )
    summed: Tensor = titan.combine_tokens(experts(rows, counts.cumsum(0).int()), state)
    titan.sync_combine()
    return summed


WAYS: dict[str, Callable[..., Tensor]] = {
    "all_to_all": SEAMS["dispatch"].reference,
    "deepep": dispatch,
    "torchtitan": torchtitan,
}


@contextmanager
def way(name: str) -> Iterator[None]:
    SEAMS["dispatch"].chosen = WAYS[name]
    try:
        yield
    finally:
        SEAMS["dispatch"].chosen = WAYS["all_to_all"]


class Nothing(nn.Module):
    """Experts that return what they are given."""

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return x


def mixture(sizes: Sizes, experts: nn.Module | None = None) -> MixtureOfExperts:
    """With this rank's experts, the same on every call."""
    torch.manual_seed(1 + dist.get_rank())
    router = SoftmaxRouter(
        hidden_size=sizes.hidden, experts=sizes.experts, experts_per_token=sizes.choices, renormalise=True
    )
    held = Experts(
        experts=sizes.experts // dist.get_world_size(), hidden_size=sizes.hidden, intermediate_size=sizes.inner
    )
    made = MixtureOfExperts(router, held if experts is None else experts).to(DEVICE, DTYPE)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.02)
    torch.manual_seed(0)
    nn.init.normal_(made.gate.weight, std=sizes.hidden**-0.5)  # all ranks'
    made.run_experts = AllToAll(group=dist.group.WORLD, count=dist.get_world_size())  # type: ignore[arg-type]
    return made


def tokens_of(count: int, hidden: int) -> tuple[Tensor, Tensor]:
    """This rank's, and the gradient of what becomes of them."""
    draw = torch.Generator(DEVICE).manual_seed(7 + dist.get_rank())
    x, gradient = torch.randn(2, count, hidden, device=DEVICE, generator=draw).to(DTYPE)
    return x, gradient


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def over(values: float, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.MAX) -> float:
    """Of all ranks; infinity where one has no number, which a maximum would pass over."""
    tensor = torch.tensor(math.inf if math.isnan(values) else values, dtype=torch.float64, device=DEVICE)
    dist.all_reduce(tensor, operation)
    return tensor.item()


def seconds(what: Callable[[], object], rounds: int) -> float:
    """The median of rounds, each of the slowest rank."""
    found = []
    for number in range(rounds + 3):
        dist.barrier()
        wait()
        started = time.perf_counter()
        what()
        wait()
        if number >= 3:
            found.append(over(time.perf_counter() - started))
    return statistics.median(found)


# --- parts ------------------------------------------------------------------------------------------------------------
def links(job: Job) -> None:
    megabytes = 1024 if CUDA else 4
    x = torch.zeros(megabytes << 19, dtype=torch.bfloat16, device=DEVICE)
    received = torch.empty_like(x)
    away = x.nbytes * (job.ranks - 1) / job.ranks
    job.add(bytes=x.nbytes)
    for name, collective, moved in (
        ("all_reduce", lambda: dist.all_reduce(x), 2 * away),
        ("all_to_all", lambda: dist.all_to_all_single(received, x), away),
    ):
        job.add(**{f"{name}_gb_per_second": moved / seconds(collective, 10) / 1e9})


def values(job: Job) -> None:
    sizes = job.small
    most = sizes.tokens[0]
    for name, count, one_sided in (
        ("all the same", most, False),
        ("few and many", (most // 3, most)[job.rank % 2], False),
        ("experts of the first rank", most // 2, True),
    ):
        exactly = _trained("all_to_all", sizes, count, one_sided, torch.float32)
        found = {way: _trained(way, sizes, count, one_sided, DTYPE) for way in ("all_to_all", "deepep")}
        again = _trained("deepep", sizes, count, one_sided, DTYPE)
        row = {
            part: {
                "between": over(_apart(found["deepep"][part], found["all_to_all"][part])),
                **{f"{way} from float32": over(_apart(found[way][part], exactly[part])) for way in found},
                "again": over(_apart(again[part], found["deepep"][part])),
            }
            for part in exactly
        }
        job.add(**{name: row})
        job.failed |= max(part["between"] for part in row.values()) > BOUND


def _trained(way_name: str, sizes: Sizes, count: int, one_sided: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs, and gradients of this rank's tokens, router and experts."""
    made = mixture(sizes).to(dtype)
    x, gradient = (t.to(dtype) for t in tokens_of(count, sizes.hidden))
    x.requires_grad_()
    if one_sided:
        first = torch.arange(sizes.choices, device=DEVICE).expand(count, -1)
        made.gate.choose = lambda p: first  # type: ignore[method-assign, union-attr, assignment]
    with way(way_name):
        outputs = made(x, Context.packed(torch.tensor([0, count])), 0)
        outputs.backward(gradient)
    parts = {"outputs": outputs, "tokens": x.grad, **{name: p.grad for name, p in made.named_parameters()}}
    return {name: tensor.detach() for name, tensor in parts.items() if tensor is not None}


def _apart(seen: Tensor, expected: Tensor) -> float:
    return float((seen.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-12))


def speed(job: Job) -> None:
    for count in job.large.tokens:
        for what, experts in (("exchange", Nothing()), ("layer", None)):
            for name in job.ways:
                forward, both = _round(job, name, count, experts)
                moved = _bytes(job.large, count, once=name != "all_to_all")
                row = {
                    "tokens": count,
                    "what": what,
                    "way": name,
                    "forward_seconds": seconds(forward, job.rounds),
                    "forward_backward_seconds": seconds(both, job.rounds),
                    "bytes_to_the_other_rank_each_time": moved,
                }
                row["gb_per_second_of_four_times"] = 4 * moved / row["forward_backward_seconds"] / 1e9
                job.add(rows=[*job.found.get("rows", []), row])


def kernels(job: Job) -> None:
    from torch.profiler import ProfilerActivity, profile

    for name in job.ways:
        _, both = _round(job, name, job.large.tokens[0], Nothing())
        seconds(both, 1)
        with profile(activities=[ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU]) as profiler:
            for _ in range(3):
                both()
            wait()
        rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)[:14]
        job.add(
            **{name: [{"name": r.key[:110], "ms": r.self_device_time_total / 3e3, "calls": r.count / 3} for r in rows]}
        )


def sms(job: Job) -> None:
    own = exchange._processors
    for count in (None, 12, 24, 48):
        exchange._processors = own if count is None else lambda *_: count  # noqa: B023
        forward, both = _round(job, "deepep", job.large.tokens[0], Nothing())
        forward()
        row = {"sms": count, "forward": seconds(forward, job.rounds), "both": seconds(both, job.rounds)}
        if count is None:
            buffer = next(
                buffer for (_, width, _), (buffer, _) in exchange._buffers.items() if width == job.large.hidden
            )
            row["sms"] = own(buffer, job.large.experts, job.large.choices)
        job.add(rows=[*job.found.get("rows", []), row])
    exchange._processors = own


def _round(
    job: Job, name: str, count: int, experts: nn.Module | None
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward alone, and with backward, of `count` tokens with choices drawn evenly."""
    made = mixture(job.large, experts)
    x, gradient = tokens_of(count, job.large.hidden)
    weights, chosen = _choices(job.large, count)
    x.requires_grad_()
    weights.requires_grad_()

    def forward() -> Tensor:
        with way(name):
            return made.routed(x, weights, chosen)

    def both() -> None:
        forward().backward(gradient)
        for parameter in (x, weights, *made.parameters()):
            parameter.grad = None

    def alone() -> None:
        with torch.no_grad():
            forward()

    return alone, both


def _choices(sizes: Sizes, count: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator(DEVICE).manual_seed(3 + dist.get_rank())
    scores = torch.rand(count, sizes.experts, device=DEVICE, generator=draw)
    weights, chosen = scores.topk(sizes.choices)
    return (weights / weights.sum(-1, keepdim=True)).clone(), chosen


def _bytes(sizes: Sizes, count: int, *, once: bool) -> int:
    """Sent by this rank to another in one direction: each choice, or each token once."""
    away = _choices(sizes, count)[1] // (sizes.experts // dist.get_world_size()) != dist.get_rank()
    copies = away.any(1) if once else away
    return int(copies.sum()) * sizes.hidden * 2


# --- the program ------------------------------------------------------------------------------------------------------
@attrs.define(kw_only=True)
class Job:
    name: str
    folder: Path
    rank: int
    ranks: int
    small: Sizes
    large: Sizes
    ways: tuple[str, ...]
    rounds: int
    found: dict[str, Any] = attrs.field(factory=dict)
    failed: bool = False

    def add(self, **found: Any) -> None:
        self.found |= found
        if self.rank == 0:
            print(self.name, json.dumps(found)[-1500:], flush=True)
            path = self.folder / f"{self.name}.json"
            path.with_suffix(".partial").write_text(json.dumps(self.found, indent=1) + "\n")
            path.with_suffix(".partial").replace(path)


PARTS: dict[str, Callable[[Job], None]] = {
    "links": links,
    "values": values,
    "speed": speed,
    "kernels": kernels,
    "sms": sms,
    "steps": lambda job: steps(job.add, job.rank, DEVICE, (Layout(shard=2, expert=2), Layout(context=2, expert=2))),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, any machine")
    options = parser.parse_args()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if CUDA:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if CUDA else "gloo", timeout=timedelta(seconds=120))
    if options.smoke:
        stand_in()
    else:
        build(DeepEpConfig())  # says what is missing
    options.out.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in options.only.split(","):
        job = Job(
            name=name,
            folder=options.out,
            rank=rank,
            ranks=ranks,
            small=TOY if options.smoke else SMALL,
            large=TOY if options.smoke else GLM,
            ways=tuple(WAYS)[: 2 if options.smoke else 3],
            rounds=2 if options.smoke else 10,
        )
        PARTS[name](job)
        failed |= job.failed
    dist.barrier()
    exchange.close()
    dist.destroy_process_group()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
