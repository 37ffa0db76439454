"""What a mesh costs, at a size that fills a good part of a card: tokens per second and memory, planned and measured.

    python -m torch.distributed.run --nproc-per-node 2 -m benchmarks.meshes_speed_gpu --out meshes_speed.json
    python -m benchmarks.meshes_speed_gpu --smoke                    one process on a CPU, tiny; with 2 processes too

From the root of a checkout with torch, torchtitan, numpy, attrs and pluggy. Every rank trains as a trainer rank does
(`prl.train.step.Stepper`, bfloat16, layers not compiled unless --compile), the same work per GPU on every mesh of one
model; `alone` is every GPU for itself, which nothing has to be exchanged for. Planned is what `prl plan` says of the
heaviest rank (`prl.plan.memory`), measured the most that torch's allocator handed out.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import attrs
import numpy as np
import torch
import torch.distributed as dist
import train_gpu
from plan_memory_gpu import SAMPLED
from prl.blocks.precision import cast
from prl.compose.config import TrainerSection
from prl.plan.memory import Formats, Settings, memory
from prl.score.pack import pack
from prl.train import layers
from prl.train.flops import Packed, model_flops
from prl.train.layout import Layout
from prl.train.parallel.ranks import Ranks
from prl.train.step import Stepper
from prl.train.streams import StreamLoss
from prl.train.survey import optimizer_bytes, optimizer_working, survey
from prl.types import Batch
from prl_glm5 import Glm51Config
from prl_glm5.network import build as glm5
from prl_policy_gradient import DppoConfig
from prl_policy_gradient.losses import dppo
from prl_qwen3 import Qwen3Config
from prl_qwen3.network import build as qwen3
from torch import nn

VOCAB = 151_936
CUDA = torch.cuda.is_available()


@attrs.frozen(kw_only=True)
class Case:
    """One model on one mesh."""

    model: str
    build: Callable[[], nn.Module]
    layout: Layout
    length: int
    """Tokens of a document; a rank computes `documents` of them (`context` ranks as many each, together)."""
    documents: int
    checkpointing: str
    optimizer: str

    @property
    def name(self) -> str:
        axes = ("replicate", "shard", "context", "expert")
        divided = [f"{axis} {getattr(self.layout, axis)}" for axis in axes if getattr(self.layout, axis) > 1]
        return f"{self.model}: {', '.join(divided) or 'alone'}"


def cases(ranks: int, smoke: bool) -> Iterator[Case]:
    """In order of worth: what can be compared first."""
    qwen = Qwen3Config(hidden_size=1024, intermediate_size=3072, layers=28, heads=16, kv_heads=8, head_dim=128)
    mixture = {"hidden_size": 2048, "heads": 32, "kv_heads": 4, "head_dim": 128, "experts": 128, "layers": 6}
    glm: dict[str, Any] = {"size": "full", "layers": 5, "experts": 64}
    vocab, length = VOCAB, 16_384
    if smoke:
        vocab, length = 512, 256
        qwen, mixture, glm = Qwen3Config(), {"experts": 4}, {"size": "toy"}
    else:
        mixture |= {"experts_per_token": 8, "expert_intermediate_size": 768}
    moe = Qwen3Config(**mixture)
    alone, shard = Layout(), Layout(shard=ranks)
    expert, context = Layout(shard=ranks, expert=ranks), Layout(context=ranks)
    both = Layout(context=ranks, expert=ranks)

    def dense() -> nn.Module:
        return qwen3(qwen, vocab)

    def experts() -> nn.Module:
        return qwen3(moe, vocab)

    def sparse() -> nn.Module:
        return glm5(Glm51Config(**glm), 512)

    every = {"length": length, "documents": 1}
    plain = {"checkpointing": "none", "optimizer": "adamw", **every}
    stateless = {"checkpointing": "full", "optimizer": "sign_sgd", **every}
    found = [
        *(("qwen3-0.6b", dense, layout, plain) for layout in (alone, shard, context)),
        *(("qwen3 mixture", experts, layout, plain) for layout in (shard, expert, both)),
        *(("glm-5.1 slice", sparse, layout, stateless) for layout in (expert, both, shard)),
        ("qwen3-0.6b", dense, Layout(replicate=ranks), plain),
    ]
    seen = set()
    for model, build, layout, settings in found:
        case = Case(model=model, build=build, layout=layout, **settings)
        if case.name not in seen:  # one rank has one mesh
            seen.add(case.name)
            yield case


def lengths(case: Case) -> tuple[int, ...]:
    """Of the documents that one group of `context` ranks computes together."""
    return (case.length * case.layout.context,) * case.documents


def batch_of(case: Case, vocab: int, step: int, first: int) -> Batch:
    """As many micro-batches of `lengths` as there are groups of ranks."""
    draw = np.random.default_rng((step, first))
    each = lengths(case)
    samples = [train_gpu.sample_of(draw, length, vocab, step) for _ in range(case.layout.data) for length in each]
    return pack(
        samples,
        step=step + 1,
        version=step,
        phase="rl",
        ranks=case.layout.ranks,
        context=case.layout.context,
        micro_batch_tokens=sum(each) // case.layout.context,
    )


def planned(case: Case, chunk: int) -> int:
    """Bytes of the heaviest rank at its worst moment."""
    build = train_gpu.OPTIMIZERS[case.optimizer]
    dtype = torch.bfloat16 if CUDA else torch.float32
    per_byte, per_parameter = optimizer_bytes(build, dtype)
    settings = Settings(
        layout=case.layout,
        formats=Formats(
            parameter=dtype.itemsize,
            compute=dtype.itemsize,
            optimizer=per_byte,
            optimizer_per_parameter=per_parameter,
            optimizer_working=optimizer_working(build, dtype),
            serve=2,
        ),
        checkpointing="full" if case.checkpointing == "full" else "none",
        optimizer_offload=False,
        logprob_chunk=chunk,
    )
    surveyed = survey(case.build, device="cuda" if CUDA else "cpu", dtype=dtype, float32=train_gpu.KEEP_FLOAT32)
    return memory(surveyed, settings, lengths(case), sampled=SAMPLED, accumulating=False).peak


def model_of(case: Case, ranks: Ranks, trainer: TrainerSection, *, exact: bool = False) -> nn.Module:
    """This rank's part; `exact`: the same numbers, computed with in float32."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if CUDA else torch.float32)
    with ranks.device:
        model = case.build()
    torch.set_default_dtype(torch.float32)
    cast(model, torch.bfloat16 if CUDA and not exact else torch.float32, float32=train_gpu.KEEP_FLOAT32)
    layers.apply(model, trainer)
    ranks.shard(model)
    return model


def measure(case: Case, rank: int, device: torch.device, compiled: bool, timed: int) -> dict[str, Any]:
    torch._dynamo.reset()
    ranks = Ranks.laid_out(rank % case.layout.ranks, device, case.layout)
    chunk = 8192 if CUDA else 64
    trainer = TrainerSection(activation_checkpointing=case.checkpointing, compile=compiled)  # type: ignore[arg-type]
    model = model_of(case, ranks, trainer)
    stepper = Stepper(
        model=model,
        optimizer=train_gpu.OPTIMIZERS[case.optimizer](model.named_parameters()),
        losses={"rl": StreamLoss(function=dppo(DppoConfig()))},
        logprob_chunk=chunk,
        max_grad_norm=1.0,
        device=device,
        compiled=compiled,
        context=ranks.context,
    )
    vocab = len(model.head())  # type: ignore[operator]
    apart = rank // case.layout.ranks  # ranks that are alone have batches of their own
    seconds = []
    for number in range(2 + timed):
        batch = batch_of(case, vocab, number, apart)
        if CUDA:
            torch.cuda.synchronize()
            if number == 1:
                torch.cuda.reset_peak_memory_stats()
        if dist.is_initialized():
            dist.barrier()
        started = time.perf_counter()
        stepper.step(batch, batch.ranks[ranks.rank], 1e-6)
        if CUDA:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if CUDA else 0
    return _row(case, _largest(statistics.median(seconds[2:])), _largest(peak), planned(case, chunk))


def _largest(value: float) -> float:
    """Of all ranks."""
    if not dist.is_initialized():
        return value
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return float(max(every))


def _row(case: Case, seconds: float, measured: float, plan: int) -> dict[str, Any]:
    with torch.device("meta"):
        model = case.build()
    each, context = lengths(case), case.layout.context
    tokens = sum(each) / context
    flops = model_flops(model, Packed(each), scored=round(SAMPLED * sum(each))).model / context
    row: dict[str, Any] = {
        "name": case.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "optimizer": case.optimizer,
        "checkpointing": case.checkpointing,
        "tokens_per_gpu": tokens,
        "seconds_per_step": seconds,
        "tokens_per_second_per_gpu": tokens / seconds,
        "flops_per_second_per_gpu": flops / seconds,
        "planned_gib": plan / 2**30,
    }
    peaks = (peak for key, peak in train_gpu.PEAK_BF16.items() if CUDA and key in torch.cuda.get_device_name())
    if peak := next(peaks, None):
        row["mfu"] = flops / seconds / peak
    if measured:
        row |= {"measured_gib": measured / 2**30, "difference": plan / measured - 1}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose names contain it")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, any machine")
    parser.add_argument("--compile", action="store_true", help="compile layers; plans know no compiler")
    parser.add_argument("--timed", type=int, default=4, help="steps that count")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no case after so long")
    parser.add_argument("--out", type=Path, help="where results are written, after every case")
    options = parser.parse_args()
    began = time.monotonic()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if CUDA else torch.device("cpu")
    if CUDA:
        torch.cuda.set_device(device)
    if world > 1:
        # A rank that runs out of memory leaves the other in a collective: it must not wait for long.
        dist.init_process_group("nccl" if CUDA else "gloo", timeout=timedelta(seconds=90))
    rows: list[dict[str, Any]] = []
    for case in cases(world, options.smoke):
        late = _largest(time.monotonic() - began) > options.seconds
        if options.only not in case.name or late:
            continue
        try:
            row = measure(case, rank, device, options.compile and CUDA, options.timed)
        except torch.OutOfMemoryError as error:
            traceback.print_exc()
            row = {"name": case.name, "error": str(error).splitlines()[0]}
        rows.append(row)
        if rank == 0:
            print(json.dumps(row), flush=True)
            if options.out:
                name = torch.cuda.get_device_name() if CUDA else "CPU"
                document = {"torch": torch.__version__, "device": name, "ranks": world, "results": rows}
                options.out.write_text(json.dumps(document, indent=1) + "\n")
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
