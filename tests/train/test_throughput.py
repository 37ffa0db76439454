"""What a rank reports of its work: tokens, FLOPs of whole documents, and its share of those it computes with others."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from prl.compose.config import CostsSection
from prl.score.costs import BY_TOKENS
from prl.score.pack import share
from prl.train.flops import Packed, model_flops
from prl.train.streams import is_scored
from prl.train.survey import Survey, survey
from prl.train.throughput import Throughput
from torch import nn

from tests.train.tiny import build_qwen3, pack_batch, random_samples

MICRO = pack_batch(random_samples(6), ranks=1, micro_batch_tokens=1000).ranks[0][0]


def surveyed(build) -> Survey:
    return survey(build, device="cuda", dtype=torch.float32)


def throughput() -> Throughput:
    return Throughput(survey=surveyed(functools.partial(build_qwen3, experts=4)), device=torch.device("cpu"))


def test_tokens_and_flops_are_those_of_the_documents() -> None:
    lengths = np.diff(MICRO.cu_seqlens).tolist()
    expected = model_flops(build_qwen3(experts=4), Packed(lengths), scored=int(is_scored(MICRO).sum())).model
    assert throughput().sums([MICRO, MICRO]) == {
        "throughput/tokens": 2.0 * len(MICRO.tokens),
        "throughput/flops": 2 * expected,
    }


def test_ranks_that_share_documents_report_shares_that_add_up() -> None:
    whole = throughput().sums([MICRO])
    parts = [throughput().sums([share(MICRO, index, 2)]) for index in range(2)]
    assert sum(part["throughput/tokens"] for part in parts) == whole["throughput/tokens"]
    assert sum(part["throughput/flops"] for part in parts) == pytest.approx(whole["throughput/flops"], rel=0.05)


@pytest.mark.parametrize("attention", [1.0, 3.0])
def test_a_sequence_costs_the_operations_of_all_layers_and_the_head(attention: float) -> None:
    """Counted again by hand from what attention and everything else do."""
    section = CostsSection(attention=attention)
    costs = throughput().costs(60, section)
    for length in (1, 7, 60):
        flops = model_flops(build_qwen3(experts=4), Packed([length]), scored=length)
        work = [pair for side in (flops.forward, flops.backward, flops.recompute) for pair in side.items()]
        expected = sum(n * (attention if kind == "attention" else 1.0) for kind, n in work)
        assert costs.of([length]) == [pytest.approx(expected, rel=1e-9)]


def test_a_model_that_nobody_can_count_still_has_tokens() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Bilinear(2, 2, 2)])
            self.output = nn.Linear(2, 3)

        def head(self) -> nn.Parameter:
            return self.output.weight

    odd = Throughput(survey=surveyed(Odd), device=torch.device("cpu"))
    assert odd.sums([MICRO]) == {"throughput/tokens": float(len(MICRO.tokens))}
    assert odd.values() == {}
    assert odd.costs(10, CostsSection()) == BY_TOKENS
    assert odd.peaks()["memory/peak"] > 1e7
