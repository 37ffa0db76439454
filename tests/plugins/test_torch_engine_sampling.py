"""Drawing tokens: the right distribution, reproducible, one stream of numbers per seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from prl_torch_engine.sampling import GOLDEN, draw, stream, uniforms

CHI_SQUARE_63 = 103.4
"""The value a chi-square variable with 63 degrees of freedom exceeds once in a thousand times."""


def counters(seeds: range, position: int) -> np.ndarray:
    return np.array([stream(seed, position) for seed in seeds], dtype=np.uint64)


def test_drawn_tokens_follow_the_distribution() -> None:
    logprobs = torch.randn(64, generator=torch.Generator().manual_seed(1)).mul(1.5).log_softmax(0)
    draws = 20_000
    tokens = draw(logprobs.expand(draws, -1), torch.from_numpy(uniforms(counters(range(draws), 17))))
    expected = logprobs.exp().double() * draws
    seen = torch.bincount(tokens, minlength=64)
    assert float(((seen - expected) ** 2 / expected).sum()) < CHI_SQUARE_63


def test_one_row_over_its_positions_follows_the_distribution() -> None:
    logprobs = torch.randn(64, generator=torch.Generator().manual_seed(2)).log_softmax(0)
    draws = 20_000
    along = np.array(stream(5, 0), dtype=np.uint64) + np.arange(draws, dtype=np.uint64) * np.uint64(GOLDEN)
    tokens = draw(logprobs.expand(draws, -1), torch.from_numpy(uniforms(along)))
    expected = logprobs.exp().double() * draws
    assert float(((torch.bincount(tokens, minlength=64) - expected) ** 2 / expected).sum()) < CHI_SQUARE_63


def test_neighbouring_seeds_are_uncorrelated() -> None:
    a, b = (uniforms(counters(range(s, s + 5000), 3)) for s in (0, 1))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.05
    assert abs(float(a.mean()) - 0.5) < 0.02


def test_a_stream_advances_by_its_increment() -> None:
    assert stream(9, 12) == (stream(9, 11) + GOLDEN) % 2**64


@pytest.mark.parametrize("vocab", [5000, 4097, 1025])
def test_large_vocabularies_are_drawn_from_in_blocks_with_the_same_result(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logprobs = torch.randn(300, vocab, generator=generator).mul(3).log_softmax(1)
    uniform = torch.rand(300, generator=generator, dtype=torch.float64)
    sums = logprobs.exp().cumsum(1, dtype=torch.float64)
    whole = torch.searchsorted(sums, (uniform * sums[:, -1])[:, None], right=True)[:, 0]
    assert (draw(logprobs, uniform) == whole).float().mean() > 0.99  # sums of float32 blocks round differently


@pytest.mark.parametrize("vocab", [8, 3000])
@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-52])
def test_impossible_tokens_are_never_drawn(vocab: int, uniform: float) -> None:
    logits = torch.zeros(1, vocab)
    logits[0, :3] = -torch.inf
    logits[0, -3:] = -torch.inf
    token = int(draw(logits.log_softmax(1), torch.tensor([uniform], dtype=torch.float64)))
    assert token == (3 if uniform == 0.0 else vocab - 4)
