"""The phases of benchmarks/vllm_gpu.py that are one process each: (sizes, folder) -> figures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from prl.blocks.decoder import Decoder
    from prl.compose.compose import Composition

    from benchmarks.vllm_gpu import Sizes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DEVIATION = 0.06
"""Of all matrices: outputs are uneven and depend on the experts, as a trained model's do."""


def _composed(folder: Path) -> Composition:
    from prl.compose.compose import compose

    return compose(folder / "run.toml", probe=False)


# --- export -----------------------------------------------------------------------------------------------------------
def export(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """The model, in bfloat16, as a Hugging Face checkpoint."""
    from prl.blocks import checkpoint
    from prl.providers import Model

    composition = _composed(folder)
    run, provider = composition.run, cast(Model, composition.provider(composition.run.model))
    vocabulary = sizes.model["vocab_size"]
    started = time.perf_counter()
    torch.manual_seed(0)
    with DEVICE:
        model: Decoder = composition.build(run.model, vocabulary)
        for tensor in model.parameters():
            if tensor.dim() >= 2:
                torch.nn.init.normal_(tensor, 0.0, DEVIATION)
    model.bfloat16()
    checkpoint.save(
        model.state_dict().items(), composition.load(provider.weights)(run.model, vocabulary), folder / "model"
    )
    count = sum(tensor.numel() for tensor in model.parameters())
    idle = sum(
        tensor.numel() * (1 - sizes.model["experts_per_token"] / sizes.model["experts"])
        for name, tensor in model.named_parameters()
        if "experts." in name
    )
    return {
        "parameters": count,
        "active_parameters": round(count - idle),
        "write_seconds": time.perf_counter() - started,
    }


# --- plain vLLM -------------------------------------------------------------------------------------------------------
def plain(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Tokens per second of vLLM alone, with log-probabilities and routes; what it said goes to plain.npz."""
    import os

    from benchmarks.vllm_gpu import SEQUENCES

    if DEVICE.type == "cpu":
        os.environ |= {"PRL_VLLM": "1", "PRL_VLLM_ROUTES": "1"}
    from vllm import LLM, SamplingParams

    generator = np.random.default_rng(0)
    prompts = generator.integers(3, sizes.model["vocab_size"], (sizes.prompts, sizes.prompt_tokens)).tolist()
    on_gpu = {"enable_return_routed_experts": True} if DEVICE.type == "cuda" else {"enforce_eager": True}
    started = time.perf_counter()
    engine = LLM(
        model=str(folder / "model"),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=SEQUENCES,
        kv_cache_memory_bytes=sizes.run["engine"].get("kv_cache_bytes", 64 << 20),
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
        seed=0,
        **{**on_gpu, **_composed(folder).run.engine.options},
    )
    figures: dict[str, Any] = {"startup_seconds": time.perf_counter() - started}

    def generate(seeded: bool, count: int) -> list[Any]:
        asked = [
            SamplingParams(
                temperature=1.0,
                max_tokens=sizes.sampled,
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
                seed=index if seeded else None,
            )
            for index in range(count)
        ]
        return engine.generate([{"prompt_token_ids": prompt} for prompt in prompts[:count]], asked, use_tqdm=False)

    generate(False, min(SEQUENCES, sizes.prompts))
    for name, seeded in (("unseeded", False), ("seeded", True)):
        engine.reset_prefix_cache()
        started = time.perf_counter()
        outputs = generate(seeded, sizes.prompts)
        seconds = time.perf_counter() - started
        figures[name] = {"seconds": seconds, "tokens_per_second": sizes.prompts * sizes.sampled / seconds}
    _keep(outputs[: sizes.scored], folder / "plain.npz")
    return figures


def _keep(outputs: list[Any], path: Path) -> None:
    """tokens [S, L], logprobs [S, sampled], routes [S, L - 1, layers, K]"""
    np.savez(
        path,
        tokens=np.array([[*o.prompt_token_ids, *o.outputs[0].token_ids] for o in outputs]),
        logprobs=np.array(
            [[next(iter(at.values())).logprob for at in output.outputs[0].logprobs] for output in outputs]
        ),
        routes=np.stack([o.outputs[0].routed_experts for o in outputs]),
    )


# --- the same tokens in the trainer's modules -------------------------------------------------------------------------
@torch.no_grad()
def score(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """k3 = E[e^d - d - 1], d = trainer - vLLM, both in bfloat16: with the trainer's own experts, and with vLLM's."""
    from prl.blocks import checkpoint
    from prl.blocks.routing import RouteLog
    from prl.providers import Model

    composition = _composed(folder)
    run, provider = composition.run, cast(Model, composition.provider(composition.run.model))
    said = np.load(folder / "plain.npz")
    tokens = torch.from_numpy(said["tokens"]).to(DEVICE)
    told = torch.from_numpy(said["logprobs"]).to(DEVICE)
    with torch.device("meta"):
        model: Decoder = composition.build(run.model, sizes.model["vocab_size"])
    model.bfloat16().to_empty(device=DEVICE)
    checkpoint.load(model, composition.load(provider.weights)(run.model, sizes.model["vocab_size"]), folder / "model")
    log = RouteLog(replay=_replay(said["routes"], composition))
    replayed, entropy = _logprobs(model, tokens, told.shape[1], log)
    own, _ = _logprobs(model, tokens, told.shape[1], RouteLog())
    at = slice(-1 - told.shape[1], -1)
    layers = torch.stack(list(log.differing.values())).view(-1, *tokens.shape)[:, :, at]
    elsewhere = layers.any(0)
    figures = {
        "tokens": told.numel(),
        "entropy": entropy,
        "routed_elsewhere_in_a_layer": float(elsewhere.float().mean()),
        "routed_elsewhere_per_layer": float(layers.float().mean()),
        "k3": _k3(own - told),
        "k3_replayed": _k3(replayed - told),
        "mean_difference": float((own - told).abs().mean()),
        "mean_difference_replayed": float((replayed - told).abs().mean()),
    }
    return {**figures, "reduction": figures["k3"] / figures["k3_replayed"]}


def _replay(routes: np.ndarray[Any, Any], composition: Composition) -> Any:
    """routes [S, L - 1, layers, K]; the last token of a sequence was never computed."""
    from prl.blocks.routing import Replay
    from prl.compose.routing import replayed

    routing = replayed(composition)
    assert routing is not None, "a mixture of experts"
    rows = torch.from_numpy(routes.astype(np.int16)).to(DEVICE)
    experts = torch.cat([rows, torch.zeros_like(rows[:, :1])], 1)
    known = torch.ones(experts.shape[:2], dtype=torch.bool, device=DEVICE)
    known[:, -1] = False
    return Replay.of(experts.flatten(0, 1), known.flatten(), layers=routing.indices, count=routing.experts)


def _logprobs(model: Decoder, tokens: Tensor, sampled: int, log: Any) -> tuple[Tensor, float]:
    """tokens [S, L] -> [S, sampled] of the sampled ones, and the mean entropy there."""
    from prl.blocks.context import Context

    count, length = tokens.shape
    with DEVICE:
        context = Context.packed(torch.arange(0, count * length + 1, length, device="cpu"))
    context.routes = log
    hidden = model.hidden(tokens.flatten(), context).view(count, length, -1)[:, -1 - sampled : -1]
    chosen, entropies = [], []
    for states, targets in zip(hidden, tokens[:, -sampled:], strict=True):
        logprobs = (states @ model.head().T).float().log_softmax(-1)
        chosen.append(logprobs.gather(1, targets[:, None])[:, 0])
        entropies.append(-(logprobs.exp() * logprobs).sum(-1).mean())
    return torch.stack(chosen), float(torch.stack(entropies).mean())


def _k3(difference: Tensor) -> float:
    """E[e^d - d - 1] (Schulman 2020)."""
    d = difference.double()
    return float((d.expm1() - d).mean())
