"""The part `routes` of benchmarks/vllm_two_gpus.py: how far the experts of two answers to one question are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from prl.types import Completion

if TYPE_CHECKING:
    from benchmarks.vllm_two_gpus_parts import Job


def routes(job: Job) -> None:
    """Experts of prompts that were handed over, and of what was sampled from them, beside a plain server's; how far a
    second plain server, and the engine for prompts asked directly, are from that one is what noise alone changes."""
    routed, lengths = 'trainer.router_replay="on"', [length for length in (90, 300, 517, 800) for _ in range(4)]
    layouts = {
        "plain": (routed,),
        "plain again": (routed,),
        "prefill and decode": (routed, "engine.count=2", "engine.prefill.count=1"),
    }
    with job.up(layouts) as fleets:
        for version in (0, 1):
            asked = {}
            for name, fleet in fleets.items():
                fleet.publish(version, seed=1 + version)
                asked[name] = fleet.engines[-1]
            asked["engine for prompts"] = fleets["prefill and decode"].engines[0]
            prompts = asked["plain"].prompts(*lengths, seed=30 + version)
            before = asked["prefill and decode"].statistics()["handed_tokens"]
            answers = {
                name: [engine.routed(p, temperature=0.0, max_tokens=job.sizes.talk.sampled)[0] for p in prompts]
                for name, engine in asked.items()
            }
            handed = asked["prefill and decode"].statistics()["handed_tokens"] - before
            figures = {name: beside(answers["plain"], answers[name], prompts) for name in asked if name != "plain"}
            job.report.add(**{f"version_{version}": {"handed": handed / sum(map(len, prompts)), **figures}})


def beside(ones: Sequence[Completion], others: Sequence[Completion], prompts: Sequence[list[int]]) -> dict[str, Any]:
    """Shares of choices that are the same, of tokens of prompts and of sampled ones (up to where those differ).

    `shifted` is the share that is left when one side's rows are moved by one: what rows that belong to other tokens
    would have. Completions have the routes of all their tokens.
    """
    parts: dict[str, list[tuple[NDArray[Any], NDArray[Any]]]] = {"prompts": [], "sampled": []}
    for one, other, prompt in zip(ones, others, prompts, strict=True):
        assert one.routes is not None
        assert other.routes is not None
        left, right = one.routes.experts, other.routes.experts
        assert len(left) == len(prompt) + len(one.tokens) - 1
        assert len(right) == len(prompt) + len(other.tokens) - 1
        (apart,) = (one.tokens != other.tokens).nonzero()
        end = len(prompt) + (int(apart[0]) if len(apart) else len(one.tokens) - 1)
        parts["prompts"].append((left[: len(prompt)], right[: len(prompt)]))
        parts["sampled"].append((left[len(prompt) : end], right[len(prompt) : end]))
    return {
        "tokens_equal": sum(a.tokens.tolist() == b.tokens.tolist() for a, b in zip(ones, others, strict=True)),
        "completions": len(ones),
        **{name: _shares(pairs) for name, pairs in parts.items()},
    }


def _shares(pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> dict[str, Any]:
    found = np.concatenate([_found(one, other) for one, other in pairs])  # [tokens, layers, experts per token]
    shifted = np.concatenate([_found(one[1:], other[:-1]) for one, other in pairs if len(one) > 1])
    return {
        "tokens": len(found),
        "choices_equal": float(found.mean()),
        "tokens_equal_in_every_layer": float(found.all((1, 2)).mean()),
        "choices_equal_by_layer": found.mean((0, 2)).round(4).tolist(),
        "shifted": float(shifted.mean()),
    }


def _found(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.bool_]:
    """[tokens, layers, K] whether an expert of one is among the other's."""
    found: NDArray[np.bool_] = (one[..., None] == other[..., None, :]).any(-1)
    return found
