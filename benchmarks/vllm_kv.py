"""Where keys and values of prompts come from: one plain vLLM server, tiers behind its cache, engines for prompts, both.

    python -m benchmarks.vllm_kv

Real servers on a CPU, a small mixture of experts in float32, greedy sampling. Conversations of two turns, more of them
than cache and host memory hold, are gone through twice: the second time stands for other groups that ask the same, or
for what an evaluation asks again. Reported per layout: where the tokens of prompts came from, the bytes moved by each
way, and what all this must not change: tokens, log-probabilities, and the experts of every token of prompt and
completion, beside the plain server.

It needs what tests/plugins/test_vllm_*.py need (docs/vllm.md). Seconds are those of the second pass.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from prl.types import Completion

from tests.plugins.served_vllm import Served, fleet

RESULTS = Path(__file__).parent / "results" / "vllm_kv.json"
LENGTH = 1024
BLOCK_BYTES = 128 << 10
MODEL = (
    "model.layers=2",
    "model.experts=8",
    "model.experts_per_token=2",
    "model.expert_intermediate_size=64",
    f"engine.length={LENGTH}",
    'trainer.router_replay="on"',
    'weights.type="disk"',
)
MOVED = ("fetched_bytes", "host_written_bytes", "host_read_bytes", "disk_written_bytes", "disk_read_bytes")
Turns = list[Completion]


@attrs.frozen(kw_only=True)
class Talk:
    """What is asked."""

    conversations: int
    turn: int = 300
    """Tokens that a person's turn has at least."""
    sampled: int = 24


def layouts(folder: Path, blocks: int) -> dict[str, tuple[str, ...]]:
    """Name -> edits of the config. The plain server has room for everything, the others for `blocks` blocks."""
    room = f"engine.kv_cache_bytes={blocks * BLOCK_BYTES}"
    tiers = (f"engine.kv_tiers.host_bytes={blocks * BLOCK_BYTES}", f'engine.kv_tiers.disk="{folder / "kv"}"')
    prefill = ("engine.count=2", "engine.prefill.count=1")
    return {
        "plain": (),
        "small cache": (room,),
        "small cache, tiers": (room, *(edit.replace("/kv", "/kv-tiers") for edit in tiers)),
        "prefill and decode": (*prefill,),
        "prefill and decode, small caches, tiers": (*prefill, room, *tiers),
    }


@attrs.frozen(kw_only=True)
class Measured:
    """The second pass of one layout; counts are of all its engines."""

    layout: str
    seconds: float
    prompt_tokens: int
    """Of the requests, not of what engines ask each other."""
    handed: float
    """Share of them that another engine computed."""
    hits: float
    """Share of what engines were asked for, by requests or by each other, that lay in their caches."""
    outside: float
    """... that came from host memory, disk or another engine."""
    moved: dict[str, float]
    """Bytes, by way."""
    completions: int
    differing: int
    """Completions whose tokens are not all those of the reference."""
    logprob_gap: float
    routes_equal: bool
    rows: int
    """Of routes, compared."""


def converse(engine: Served, prompts: Sequence[list[int]], talk: Talk) -> list[Turns]:
    """Two turns of each conversation; the second brings more text."""
    conversations = []
    for prompt in prompts:
        (first,) = engine.routed(prompt, temperature=0.0, max_tokens=talk.sampled)
        longer = [*prompt, *first.tokens.tolist(), *prompt[: talk.turn]]
        (second,) = engine.routed(longer, temperature=0.0, max_tokens=talk.sampled)
        conversations.append([first, second])
    return conversations


def measure(
    layout: str, engines: Sequence[Served], talk: Talk, reference: list[Turns] | None
) -> tuple[Measured, list[Turns]]:
    """(measurement, completions of the second pass); the engines serve a version already."""
    sampling = engines[-1]
    prompts = sampling.prompts(*[talk.turn + 7 * i for i in range(talk.conversations)], seed=3)
    converse(sampling, prompts, talk)
    before = _total(engines)
    started = time.perf_counter()
    answers = converse(sampling, prompts, talk)
    seconds = time.perf_counter() - started
    after = _total(engines)
    more = {name: after[name] - before[name] for name in after}
    asked = sum(2 * len(p) + talk.sampled + len(p[: talk.turn]) for p in prompts)
    pairs = list(zip(_flat(answers), _flat(reference or answers), strict=True))
    result = Measured(
        layout=layout,
        seconds=round(seconds, 2),
        prompt_tokens=asked,
        handed=round(more["handed_tokens"] / asked, 3),
        hits=round(more["prefix_hit_tokens"] / more["prompt_tokens"], 3),
        outside=round(more["outside_hit_tokens"] / more["prompt_tokens"], 3),
        moved={name: more[name] for name in MOVED},
        completions=len(pairs),
        differing=sum(a.tokens.tolist() != b.tokens.tolist() for a, b in pairs),
        logprob_gap=max(_gap(a, b) for a, b in pairs),
        routes_equal=all(_routes(a) == _routes(b) for a, b in pairs),
        rows=sum(len(a.routes.versions) for a, _ in pairs if a.routes is not None),
    )
    return result, answers


def _gap(one: Completion, other: Completion) -> float:
    """The largest difference of a log-probability, up to where tokens differ."""
    (apart,) = (one.tokens != other.tokens).nonzero()
    same = int(apart[0]) if len(apart) else len(one.tokens)
    return float(np.abs(one.logprobs - other.logprobs)[:same].max(initial=0.0))


def _total(engines: Sequence[Served]) -> dict[str, float]:
    every = [engine.statistics() for engine in engines]
    return {name: sum(one[name] for one in every) for name in every[0]}


def _flat(conversations: list[Turns]) -> Turns:
    return [turn for turns in conversations for turn in turns]


def _routes(completion: Completion) -> Any:
    """Complete, and equal as sets, where these are equal."""
    routes = completion.routes
    assert routes is not None
    return np.sort(routes.experts, 2).tolist(), routes.versions.tolist(), routes.start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=24, help="of 128 tokens: cache, and host memory, of each engine")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    results: list[Measured] = []
    reference = None
    with tempfile.TemporaryDirectory() as name:
        for layout, edits in layouts(Path(name), chosen.blocks).items():
            run = Path(name) / layout.replace(" ", "-").replace(",", "")
            with fleet(run, *MODEL, *edits, plugins="vllm,disk") as engines:
                manifest = engines[0].trainer.send(0)
                for engine in engines:
                    engine.run(engine.serve(manifest))
                result, answers = measure(layout, engines, Talk(conversations=chosen.conversations), reference)
            reference = reference or answers
            results.append(result)
            print(json.dumps(attrs.asdict(result)), flush=True)
            chosen.out.write_text(json.dumps([attrs.asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
