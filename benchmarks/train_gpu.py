"""The trainer's step on one GPU, beside a plain compiled torch + transformers loop.

    python benchmarks/train_gpu.py --out benchmarks/results/train_gpu.json            everything, about 20 minutes
    python benchmarks/train_gpu.py --only qwen3-0.6b/16k                              cases whose names contain it
    python benchmarks/train_gpu.py --only "slice/one document" --profile       with the kernels of a step
    python benchmarks/train_gpu.py --only slice --optimizer sign_sgd                  on a card of 80 GB
    python benchmarks/train_gpu.py --only "inputs in host memory"                     checkpoints in host memory
    python benchmarks/train_gpu.py --smoke                                            tiny, on any machine

prl's side is `prl.train.step.Stepper` with the DPPO loss and the adamw plugin, as a trainer rank runs it, on synthetic
rl batches; transformers' side trains the same shape on as many tokens with a policy-gradient loss of its own. Every
case reports seconds per step, tokens per second, MFU by `prl.train.flops` (nothing counted twice for what is computed
again), and peak memory; with --profile also the kernels that take longest. `attention` compares kernels by length of
document.

Runs from a checkout with torch, numpy, attrs, pluggy and transformers alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "core"), *(str(kind) for kind in (ROOT / "plugins").iterdir())]

import attrs  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from prl.blocks.attend import attend  # noqa: E402
from prl.blocks.context import Context  # noqa: E402
from prl.blocks.dsa import select_topk  # noqa: E402
from prl.blocks.precision import cast  # noqa: E402
from prl.compose.config import TrainerSection  # noqa: E402
from prl.score.pack import pack  # noqa: E402
from prl.train import layers  # noqa: E402
from prl.train.flops import Packed, model_flops  # noqa: E402
from prl.train.step import Stepper  # noqa: E402
from prl.train.streams import StreamLoss  # noqa: E402
from prl.types import Batch, Sample  # noqa: E402
from prl_adamw import AdamWConfig  # noqa: E402
from prl_adamw.adamw import build as adamw  # noqa: E402
from prl_glm5 import Glm51Config  # noqa: E402
from prl_glm5.network import build as glm5  # noqa: E402
from prl_nemotron3 import UltraConfig  # noqa: E402
from prl_nemotron3.network import build as nemotron3  # noqa: E402
from prl_packed_topk.kernel import select_topk as packed_topk  # noqa: E402
from prl_policy_gradient import DppoConfig  # noqa: E402
from prl_policy_gradient.losses import dppo  # noqa: E402
from prl_qwen3 import Qwen3Config  # noqa: E402
from prl_qwen3.network import build as qwen3  # noqa: E402
from prl_sign_sgd import SignSgdConfig  # noqa: E402
from prl_sign_sgd.sign_sgd import build as sign_sgd  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

PEAK_BF16 = {"H200": 989e12, "H100": 989e12}
"""Dense bf16 FLOP/s by the data sheet."""
TOP_KERNELS = 20
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
KEEP_FLOAT32 = ("e_score_correction_bias", "mixer.A_log", "mixer.D", "mixer.dt_bias")
QWEN = {"vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "layers": 28, "heads": 16, "kv_heads": 8}
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "layers": 2, "heads": 4, "kv_heads": 2}


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda named: adamw(AdamWConfig(learning_rate=1e-6), named, 1e-6),
    "sign_sgd": lambda named: sign_sgd(SignSgdConfig(learning_rate=1e-6), named, 1e-6),
}
"""Of a bfloat16 parameter adamw keeps 12 bytes, sign_sgd none: the slices fit in 80 GB with it alone."""


@attrs.frozen(kw_only=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    lengths: tuple[int, ...]
    """Tokens of each document; all in one micro-batch."""
    trainer: TrainerSection = attrs.field(factory=TrainerSection)
    loop: str = "prl"
    """`prl` or `transformers`."""
    note: str = ""
    packed_topk: bool = False
    """Selects tokens by the kernel of the plugin `packed_topk`."""
    optimizer: str = "adamw"
    """prl's."""


# --- cases ------------------------------------------------------------------------------------------------------------
def cases(smoke: bool, compiled: bool) -> Iterator[Case]:
    sizes = TINY if smoke else QWEN
    head_dim = 16 if smoke else 128
    chunk = 64 if smoke else 8192

    def dense() -> nn.Module:
        config = {key: value for key, value in sizes.items() if key != "vocab_size"}
        return qwen3(Qwen3Config(**config, head_dim=head_dim, tied_embeddings=True), sizes["vocab_size"])

    def section(checkpointing: str, recompute: tuple[str, ...] = (), *, away: bool = False) -> TrainerSection:
        return TrainerSection(
            activation_checkpointing=checkpointing,
            recompute=recompute,
            activation_offload=away,
            compile=compiled,
            logprob_chunk=chunk,
        )

    for label, total in (("16k", 16_384), ("65k", 65_536)):
        total = total // 256 if smoke else total
        packed = (total // 8,) * 8
        for documents, lengths in (("one document", (total,)), ("8 documents", packed)):
            ways = [
                ("none", section("none")),
                ("full", section("full")),
                ("full, inputs in host memory", section("full", away=True)),
                ("mlp", section("selective", ("mlp",))),
            ]
            for way, trainer in ways:
                name = f"qwen3-0.6b/{label}/{documents}/checkpointing {way}"
                yield Case(name=f"{name}/prl", build=dense, lengths=lengths, trainer=trainer)
                if documents == "one document" and way in ("none", "full"):
                    yield Case(
                        name=f"{name}/transformers", build=dense, lengths=lengths, trainer=trainer, loop="transformers"
                    )
    toy: dict[str, Any] = {"size": "toy"}
    sparse = toy if smoke else {"size": "full", "layers": 5, "experts": 64}
    hybrid = toy if smoke else {"size": "full", "pattern": "MEM*E", "experts": 64}
    slices = (
        ("glm-5.1", lambda: glm5(Glm51Config(**sparse), 512), "3 dense layers, 2 of 64 experts"),
        ("nemotron-3-ultra", lambda: nemotron3(UltraConfig(**hybrid), 512), "MEM*E, 64 experts"),
    )
    length, count = (80, 2) if smoke else (2048, 8)
    documents = {f"{count} documents": (length,) * count, f"one document of {length * count}": (length * count,)}
    for family, build, note in slices:
        for packing, lengths in documents.items():
            for way, away, topk in (
                ("none", False, False),
                ("full", False, False),
                ("full, inputs in host memory", True, False),
                ("full", False, True),
            ):
                if topk and (family != "glm-5.1" or len(lengths) > 1):
                    continue
                yield Case(
                    name=f"{family} slice/{packing}/checkpointing {way}{' packed_topk' * topk}/prl",
                    build=build,
                    lengths=lengths,
                    trainer=section(way.partition(",")[0], away=away),
                    note=f"true widths, fewer layers: {note}",
                    packed_topk=topk,
                )


# --- the work ---------------------------------------------------------------------------------------------------------
def batch_of(lengths: Sequence[int], vocab: int, step: int) -> Batch:
    """Documents of which the first eighth is a prompt, the rest sampled by the version before."""
    draw = np.random.default_rng(step)
    return pack(
        [sample_of(draw, length, vocab, step) for length in lengths],
        step=step + 1,
        version=step,
        phase="rl",
        ranks=1,
        micro_batch_tokens=sum(lengths),
    )


def sample_of(draw: np.random.Generator, length: int, vocab: int, version: int) -> Sample:
    sampled = np.arange(length) >= max(1, length // 8)
    zeros = np.zeros(length, np.float32)
    return Sample(
        tokens=draw.integers(0, vocab, length).astype(np.int32),
        sampled=sampled,
        engine_logprobs=np.where(sampled, -np.log(vocab), 0.0).astype(np.float32),
        versions=np.where(sampled, max(version - 1, 0), -1).astype(np.int32),
        advantages=np.where(sampled, draw.standard_normal(), zeros).astype(np.float32),
        temperature=1.0,
        weights={"rl": sampled.astype(np.float32)},
    )


def prl_steps(case: Case) -> tuple[Callable[[int], object], nn.Module, int]:
    torch.manual_seed(0)
    # A model too large for float32 is drawn in bfloat16 at once.
    torch.set_default_dtype(torch.bfloat16 if CUDA else torch.float32)
    with DEVICE:
        model = case.build()
    torch.set_default_dtype(torch.float32)
    cast(model, torch.bfloat16 if CUDA else torch.float32, float32=KEEP_FLOAT32)
    layers.apply(model, case.trainer)
    stepper = Stepper(
        model=model,
        optimizer=OPTIMIZERS[case.optimizer](model.named_parameters()),
        losses={"rl": StreamLoss(function=dppo(DppoConfig()))},
        logprob_chunk=case.trainer.logprob_chunk,
        max_grad_norm=1.0,
        device=DEVICE,
        compiled=case.trainer.compile,
    )
    vocab = len(model.head())

    def step(number: int) -> object:
        batch = batch_of(case.lengths, vocab, number)
        return stepper.step(batch, batch.ranks[0], 1e-6)

    return step, model, vocab


def transformers_steps(case: Case) -> tuple[Callable[[int], object], nn.Module, int]:
    """transformers' Qwen3 at the same shape: SDPA, layers compiled, fused AdamW, log-probabilities in chunks."""
    from transformers import Qwen3Config as HfConfig
    from transformers import Qwen3ForCausalLM

    sizes = QWEN if len(case.lengths) and CUDA else TINY
    torch.manual_seed(0)
    config = HfConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        head_dim=128 if CUDA else 16,
        max_position_embeddings=1 << 17,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        use_cache=False,
    )
    with DEVICE:
        model = Qwen3ForCausalLM(config).to(torch.bfloat16 if CUDA else torch.float32)
    if case.trainer.activation_checkpointing == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    if CUDA:
        for layer in model.model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=CUDA)
    total, vocab = sum(case.lengths), sizes["vocab_size"]
    draw = torch.Generator().manual_seed(0)

    def logprobs(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = (hidden @ model.lm_head.weight.T).float()
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def step(number: int) -> None:
        tokens = torch.randint(0, vocab, (1, total), generator=draw).to(DEVICE)
        hidden = model.model(input_ids=tokens).last_hidden_state[0, :-1]
        chunks = zip(hidden.split(1024), tokens[0, 1:].split(1024), strict=True)
        found = torch.cat([checkpoint(logprobs, *chunk, use_reentrant=False) for chunk in chunks])
        ratio = (found - found.detach()).exp()
        (-ratio.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, model, vocab


# --- measuring --------------------------------------------------------------------------------------------------------
def measure(case: Case, *, warm: int, timed: int, profile: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    select_topk.chosen = packed_topk if case.packed_topk else select_topk.reference
    step, model, _ = prl_steps(case) if case.loop == "prl" else transformers_steps(case)
    with torch.device("meta"):
        work = model_flops(case.build(), Packed(case.lengths), scored=sum(case.lengths)).model
    started = time.perf_counter()
    for number in range(warm):
        step(number)
    _synchronise()
    warmed = time.perf_counter() - started
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for number in range(warm, warm + timed):
        started = time.perf_counter()
        step(number)
        _synchronise()
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    parameters = sum(p.numel() for p in model.parameters())
    result = {
        "name": case.name,
        "note": case.note,
        "parameters": parameters,
        "optimizer": case.optimizer,
        "tokens": sum(case.lengths),
        "warm_up_seconds": round(warmed, 1),
        "seconds_per_step": median,
        "tokens_per_second": sum(case.lengths) / median,
    }
    peak = next((value for name, value in PEAK_BF16.items() if CUDA and name in torch.cuda.get_device_name()), None)
    if peak:
        result["mfu"] = work / median / peak
    if CUDA:
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if profile:
        result["kernels"] = kernels(lambda: step(warm + timed))
    return result


def kernels(step: Callable[[], object]) -> list[dict[str, Any]]:
    """Those that take longest in one step: name, calls, milliseconds, share of the time of all."""
    with torch.profiler.profile() as profile:
        step()
        _synchronise()
    time_of = (lambda event: event.self_device_time_total) if CUDA else (lambda event: event.self_cpu_time_total)
    # On a GPU an operation's own kernels are listed beside it, with their time once more.
    events = [e for e in profile.key_averages() if not CUDA or e.device_type is torch.autograd.DeviceType.CUDA]
    total = sum(time_of(event) for event in events)
    longest = sorted(events, key=time_of, reverse=True)[:TOP_KERNELS]
    return [
        {"name": e.key[:120], "calls": e.count, "ms": time_of(e) / 1e3, "share": time_of(e) / total} for e in longest
    ]


def attention(smoke: bool) -> Iterator[dict[str, Any]]:
    """Forward and backward of the attention core alone, 16 heads of 128 on 8: milliseconds by kernel."""
    from prl.blocks import attend as module

    total = 512 if smoke else 65_536
    dtype = torch.bfloat16 if CUDA else torch.float32
    q, k, v = (torch.randn(total, heads, 128, device=DEVICE, dtype=dtype, requires_grad=True) for heads in (16, 8, 8))
    chosen = module._LONG
    for length in (total // 32, total // 16, total // 8, total // 4, total):
        row: dict[str, Any] = {"name": "attention", "documents": total // length, "length": length}
        for kernel, limit in (("variable_length", 1 << 40), ("by_document", 0)):
            module._LONG = limit
            with DEVICE:
                bounds = torch.arange(0, total + 1, length, device="cpu")
                context = Context.packed(bounds)
            times = []
            for _ in range(5):
                _synchronise()
                started = time.perf_counter()
                attend(q, k, v, context, scale=128**-0.5).sum().backward()
                _synchronise()
                times.append(time.perf_counter() - started)
            row[f"{kernel}_ms"] = 1000 * statistics.median(times[1:])
        yield row
    module._LONG = chosen


def _synchronise() -> None:
    if CUDA:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, any machine")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--eager", action="store_true", help="compile nothing of prl's")
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="adamw", help="prl's (default adamw)")
    parser.add_argument("--timed", type=int, default=5, help="steps that count")
    parser.add_argument("--profile", action="store_true", help="also the kernels of one more step")
    parser.add_argument("--out", type=Path, help="where results are written, after every case")
    options = parser.parse_args()
    if CUDA and torch._dynamo.config.recompile_limit < 64:
        torch._dynamo.config.recompile_limit = 64
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if CUDA else "CPU",
        "results": [],
    }

    def keep(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        results["results"].append(row)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1) + "\n")

    for case in cases(options.smoke, CUDA and not options.eager):
        if options.only not in case.name:
            continue
        gc.collect()
        torch.cuda.empty_cache()
        try:
            case = attrs.evolve(case, optimizer=options.optimizer)
            keep(measure(case, warm=2 if options.smoke else 3, timed=options.timed, profile=options.profile))
        except Exception as error:  # one case that cannot run here must not cost the others
            traceback.print_exc()
            keep({"name": case.name, "error": f"{type(error).__name__}: {str(error)[:300]}"})
    if options.only in "attention":
        for row in attention(options.smoke):
            keep(row)


if __name__ == "__main__":
    main()
