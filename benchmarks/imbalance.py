"""How evenly ranks are loaded: operations that ranks wait for, of a step with ragged documents. A count, no time.

    python -m benchmarks.imbalance --out benchmarks/results/imbalance.json          from the root, a minute on one core

For each model at full size, a step of 256 rollouts of at most 131,072 tokens (lognormal, as `prl plan` assumes them) on
16 groups of ranks, packed in three ways: by tokens, by one parabola for all models (attention costs as much as the rest
at 8,192 tokens, which `trainer.attention_length` was set to), and by the model's own operations. Ranks meet after every
micro-batch, so what a rank has less than the heaviest is waited for: `waited` is its share of all that could have been
computed, by operations counted with `prl.train.flops` (of attention and index: times what --attention says).
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from prl.compose.config import CostsSection
from prl.plan.workload import Rollouts, micro_batches
from prl.score.costs import BY_TOKENS, Costs, points
from prl.simulate.workload import LognormalLengths, LognormalSeconds, Workload
from prl.train.survey import Survey, survey
from prl_glm5 import Glm51Config
from prl_glm5.network import build as glm5
from prl_kimi_k2 import KimiConfig
from prl_kimi_k2.network import build as kimi_k2
from prl_nemotron3 import UltraConfig
from prl_nemotron3.network import build as nemotron3
from prl_qwen3 import Qwen3Config
from prl_qwen3.network import build as qwen3
from torch import nn

LONGEST, ROLLOUTS, GROUPS, ROOM = 131_072, 256, 16, 131_072
PARABOLA = Costs(tuple(points(LONGEST)), tuple(n + n * n / 8192 for n in points(LONGEST)))
QWEN = Qwen3Config(hidden_size=1024, intermediate_size=3072, layers=28, heads=16, kv_heads=8, head_dim=128)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "qwen3-0.6b": lambda: qwen3(QWEN, 151_936),
    "glm-5.1": lambda: glm5(Glm51Config(size="full"), 154_880),
    "kimi-k2.7": lambda: kimi_k2(KimiConfig(size="full"), 163_840),
    "nemotron-3-ultra": lambda: nemotron3(UltraConfig(size="full"), 131_072),
}


def lengths_of(seed: int) -> list[int]:
    """Of the rollouts of one step."""
    distribution = LognormalLengths(mean=LONGEST / 2, sigma=Rollouts().length_sigma, correlation=0.5, most=LONGEST)
    workload = Workload(lengths=distribution, latency=LognormalSeconds(mean=0.0, sigma=0.0))
    size = 8
    return [plan.tokens for group in range(ROLLOUTS // size) for plan in workload.group(seed, group, 0, size)]


def waited(packed: Sequence[Sequence[Sequence[int]]], cost: Callable[[tuple[int, ...]], float]) -> float:
    """Share of the time that ranks wait for the heaviest, if operations were time."""
    lost = most = 0.0
    for together in zip(*packed, strict=True):
        costs = [cost(tuple(micro)) for micro in together]
        lost += sum(max(costs) - c for c in costs)
        most += max(costs) * len(costs)
    return lost / most


def operations(surveyed: Survey, section: CostsSection, micro: tuple[int, ...]) -> float:
    """Of a whole micro-batch, exactly: packed, nothing between points."""
    kinds = zip(surveyed.kinds, surveyed.layer_flops(micro), strict=True)
    flops = sum((each.scaled(len(kind.layers)) for kind, each in kinds), surveyed.head_flops(sum(micro)))
    sides = (flops.forward, flops.backward, flops.recompute)
    return sum(n * getattr(section, work, 1.0) for side in sides for work, n in side.items())


def compare(name: str, section: CostsSection, seeds: int) -> dict[str, Any]:
    surveyed = survey(MODELS[name], device="cuda", dtype=torch.bfloat16)
    ways = {"tokens": BY_TOKENS, "parabola": PARABOLA, "model": surveyed.costs(LONGEST, section)}
    row: dict[str, Any] = {"name": name}
    cost = functools.cache(functools.partial(operations, surveyed, section))
    for way, costs in ways.items():
        found = []
        for seed in range(seeds):
            packed = micro_batches(lengths_of(seed), data_ranks=GROUPS, micro_batch_tokens=ROOM, costs=costs)
            found.append(waited(packed, cost))
        row[way] = sum(found) / len(found)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", type=float, default=1.0, help="time of an operation of attention")
    parser.add_argument("--seeds", type=int, default=8, help="steps, averaged")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    section = CostsSection(attention=arguments.attention)
    rows = []
    for name in MODELS:
        rows.append(compare(name, section, arguments.seeds))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        document = {"attention": arguments.attention, "seeds": arguments.seeds, "results": rows}
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
