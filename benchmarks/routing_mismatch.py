"""What router replay is for: trainer in float32, engine in bfloat16, toys of the three families.

    python -m benchmarks.routing_mismatch

The embedded engine samples with bfloat16 weights and reports its routes; the trainer scores the same tokens in float32,
once with the choices of its own routers and once with the engine's. Reported per family: the share of tokens that some
layer of the trainer would send elsewhere, and k3 = E[e^d - d - 1] with d = trainer - engine log-probability, over all
sampled tokens and over those alone that are routed differently. What is left with replay is arithmetic.

Weights are random, as are router corrections. Two cases: toys as they begin (8 experts, 2 a token), and toys with more
experts (64, 6 a token) and weights so large that the output is uneven and depends on what the experts say, as in a
trained model. Figures are means over `--seeds`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from prl.blocks import precision
from prl.blocks.context import Context
from prl.blocks.decoder import Decoder
from prl.blocks.routing import Replay, RouteLog
from prl.compose.routing import Routing
from prl.serve.requests import Request
from prl.types import Completion, Sampling, as_tokens
from prl_glm5 import Glm51Config
from prl_glm5 import network as glm5
from prl_glm5.sizes import routing as glm5_routing
from prl_kimi_k2 import KimiK27Config
from prl_kimi_k2 import network as kimi
from prl_kimi_k2.sizes import routing as kimi_routing
from prl_nemotron3 import UltraConfig
from prl_nemotron3 import network as nemotron
from prl_nemotron3 import prl_models as nemotron_models
from prl_nemotron3.sizes import routing as nemotron_routing
from prl_torch_engine.scheduler import Scheduler
from torch import Tensor

VOCAB, PROMPT, SAMPLED = 128, 16, 112
RESULTS = Path(__file__).parent / "results" / "routing_mismatch.json"
FLOAT32 = next(iter(nemotron_models())).float32
"""Endings that stay float32; Nemotron's include the others'."""


@attrs.frozen(kw_only=True)
class Case:
    """How the toys are made."""

    experts: int
    experts_per_token: int
    deviation: float
    """Of all matrices."""


CASES = {
    "as they begin": Case(experts=8, experts_per_token=2, deviation=0.06),
    "uneven": Case(experts=64, experts_per_token=6, deviation=0.15),
}


@attrs.frozen(kw_only=True)
class Measured:
    """One family and seed."""

    family: str
    seed: int
    entropy: float
    differ: float
    """Share of sampled tokens that some layer of the trainer would send elsewhere."""
    k3: float
    k3_replayed: float
    k3_differing: float
    """The same over the tokens that are routed differently."""
    k3_differing_replayed: float


def build(family: str, case: Case) -> tuple[Decoder, Routing]:
    sizes = {"experts": case.experts, "experts_per_token": case.experts_per_token}
    module, config, routing = {
        "glm-5.1": (glm5, Glm51Config(**sizes), glm5_routing),
        "kimi-k2.7": (kimi, KimiK27Config(**sizes), kimi_routing),
        "nemotron-3-ultra": (nemotron, UltraConfig(**sizes), nemotron_routing),
    }[family]
    return module.build(config, VOCAB), routing(config)


@torch.no_grad()
def draw(model: Decoder, deviation: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.dim() >= 2 and "conv1d" not in name:
            tensor.normal_(0.0, deviation, generator=generator)
        elif name.endswith("e_score_correction_bias"):
            tensor.normal_(0.0, 0.02, generator=generator)


def sample(model: Decoder, routing: Routing, prompts: Sequence[list[int]]) -> list[Completion]:
    """What the embedded engine says, with its routes."""
    engine = Scheduler(
        model, sequences=len(prompts), retained=4, length=PROMPT + SAMPLED, prefill_tokens=1024, routing=routing
    )
    engine.set_version(0)
    for index, prompt in enumerate(prompts):
        sampling = Sampling(max_tokens=SAMPLED, seed=index)
        engine.add(
            Request(request_id=str(index), prompt=as_tokens(prompt), sampling=sampling, n=1, stop=(), routes_from=0)
        )
    with torch.inference_mode():
        while engine.busy:
            engine.step()
    results = {result.request_id: result.completions[0] for result in engine.take()[0]}
    return [results[str(index)] for index in range(len(prompts))]


@torch.no_grad()
def score(model: Decoder, tokens: Tensor, log: RouteLog) -> tuple[Tensor, float]:
    """tokens [S, L] -> log-probabilities [S, SAMPLED] of the sampled ones, and the mean entropy there."""
    count, length = tokens.shape
    context = Context.packed(torch.arange(0, count * length + 1, length))
    context.routes = log
    hidden = model.hidden(tokens.flatten(), context).view(count, length, -1)[:, PROMPT - 1 : -1]
    logprobs = (hidden.float() @ model.head().float().T).log_softmax(-1)
    chosen = logprobs.gather(2, tokens[:, PROMPT:, None])[..., 0]
    return chosen, float(-(logprobs.exp() * logprobs).sum(-1).mean())


def measure(family: str, case: Case, seed: int, rollouts: int) -> Measured:
    trainer, routing = build(family, case)
    draw(trainer, case.deviation, seed)
    engine, _ = build(family, case)
    engine.load_state_dict(trainer.state_dict())
    precision.cast(engine, torch.bfloat16, float32=FLOAT32)
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, VOCAB, (rollouts, PROMPT), generator=generator).tolist()
    completions = sample(engine.eval().requires_grad_(False), routing, prompts)
    tokens = torch.tensor([[*p, *c.tokens.tolist()] for p, c in zip(prompts, completions, strict=True)])
    told = torch.tensor([c.logprobs.tolist() for c in completions])
    log = RouteLog(replay=replay(completions, routing))
    replayed, entropy = score(trainer, tokens, log)
    own, _ = score(trainer, tokens, RouteLog())
    differs = torch.stack(list(own_differs(trainer, tokens, routing, log).values())).any(0)
    differs = differs.view(len(tokens), -1)[:, PROMPT - 1 : -1]  # of the token whose state predicts the sampled one
    return Measured(
        family=family,
        seed=seed,
        entropy=entropy,
        differ=float(differs.float().mean()),
        k3=k3(own - told),
        k3_replayed=k3(replayed - told),
        k3_differing=k3((own - told)[differs]),
        k3_differing_replayed=k3((replayed - told)[differs]),
    )


def replay(completions: Sequence[Completion], routing: Routing) -> Replay:
    """Every token but the last of each sequence."""
    experts, known = [], []
    for completion in completions:
        assert completion.routes is not None
        rows = torch.from_numpy(completion.routes.experts.astype("int16"))
        experts += [rows, torch.zeros_like(rows[:1])]
        known += [torch.ones(len(rows), dtype=torch.bool), torch.zeros(1, dtype=torch.bool)]
    return Replay.of(torch.cat(experts), torch.cat(known), layers=routing.indices, count=routing.experts)


@torch.no_grad()
def own_differs(trainer: Decoder, tokens: Tensor, routing: Routing, log: RouteLog) -> dict[int, Tensor]:
    """Layer -> [T] where the trainer, left to itself, goes elsewhere than the engine did."""
    assert log.replay is not None
    own = RouteLog(chosen={})
    score(trainer, tokens, own)
    assert own.chosen is not None
    comparison = RouteLog(replay=log.replay)
    for layer in routing.indices:
        comparison.follow(layer, own.chosen[layer])
    return comparison.differing


def k3(difference: Tensor) -> float:
    """E[e^d - d - 1] (Schulman 2020)."""
    d = difference.double()
    return float((d.expm1() - d).mean()) if d.numel() else 0.0


def summary(measured: Sequence[Measured]) -> dict[str, Any]:
    def mean(name: str) -> float:
        return statistics.fmean(getattr(m, name) for m in measured)

    names = [field.name for field in attrs.fields(Measured) if field.name not in ("family", "seed")]
    means = {name: mean(name) for name in names}
    return {
        "family": measured[0].family,
        **means,
        "reduction": means["k3"] / means["k3_replayed"],
        "reduction_differing": means["k3_differing"] / means["k3_differing_replayed"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = []
    for name, case in CASES.items():
        for family in ("glm-5.1", "kimi-k2.7", "nemotron-3-ultra"):
            measured = [measure(family, case, seed, options.rollouts) for seed in range(options.seeds)]
            results.append({"case": name, **attrs.asdict(case), **summary(measured)})
            print(json.dumps({k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in results[-1].items()}))
    settings = {"seeds": options.seeds, "rollouts": options.rollouts, "tokens": SAMPLED}
    options.results.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
