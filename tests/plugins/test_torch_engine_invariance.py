"""What a request gets does not depend, to the last bit, on what else the engine computes at the same time."""

from __future__ import annotations

import random

import pytest
import torch
from prl.serve.requests import Request
from prl_qwen3 import Qwen3Config
from prl_qwen3.network import build
from prl_torch_engine import TorchEngineConfig
from prl_torch_engine.scheduler import Scheduler
from prl_torch_engine.server import batch_invariant

from tests.dispatch.fakes import toy_run
from tests.plugins.tiny_engine import STOP, VOCAB, request, tiny_model

MODELS = {
    "two-queries-a-key": tiny_model,
    "two-kernels": lambda: build(
        Qwen3Config(hidden_size=128, intermediate_size=256, layers=2, heads=4, kv_heads=2, head_dim=32), VOCAB
    ).requires_grad_(False),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def requests() -> list[Request]:
    """Prompts of many lengths with a common beginning; some are several turns of one session."""
    draw = random.Random(5)
    shared = [draw.randrange(2, VOCAB) for _ in range(9)]
    made = []
    for number in range(12):
        prompt = shared[: draw.randrange(10)] + [draw.randrange(2, VOCAB) for _ in range(draw.randrange(1, 30))]
        session = f"talk-{number // 3}" if number % 2 else ""
        made.append(
            request(
                f"r{number}", prompt, n=1 + number % 4, stop=(STOP,), seed=number << 16, session=session, max_tokens=15
            )
        )
    return made


@torch.inference_mode()
def sampled(model: str, chance: int, *, invariant: bool = True) -> dict[tuple[str, int], tuple[bytes, bytes]]:
    """Tokens and log-probabilities of every continuation, when requests come in an order and at times of chance."""
    torch.manual_seed(0)
    scheduler = Scheduler(
        MODELS[model](), sequences=16, retained=8, length=64, prefill_tokens=20, batch_invariant=invariant
    )
    scheduler.set_version(0)
    draw, left, results = random.Random(chance), requests(), {}
    draw.shuffle(left)
    while left or scheduler.busy:
        for _ in range(min(len(left), draw.choice((0, 0, 1, 2, 5)))):
            scheduler.add(left.pop())
        scheduler.step()
        for result in scheduler.take()[0]:
            for member, completion in enumerate(result.completions):
                content = completion.tokens.tobytes(), completion.logprobs.tobytes()
                results[result.request_id, member] = content
    return results


@pytest.mark.parametrize("model", MODELS)
def test_arrivals_change_no_bit(model):
    alone = sampled(model, 0)
    assert len(alone) == sum(r.n for r in requests())
    for chance in range(1, 9):
        assert sampled(model, chance) == alone


def test_without_it_they_do():
    """Otherwise the test above would show nothing."""
    assert any(sampled("two-kernels", 0, invariant=False) != sampled("two-kernels", c, invariant=False) for c in (1, 2))


@pytest.mark.parametrize(
    ("choice", "max_staleness", "expected"),
    [("auto", 0, True), ("auto", 1, False), ("on", 4, True), ("off", 0, False)],
)
def test_by_default_it_comes_with_staleness_0(choice, max_staleness, expected):
    config = TorchEngineConfig(batch_invariant=choice)
    assert batch_invariant(config, toy_run(max_staleness=max_staleness)) is expected
