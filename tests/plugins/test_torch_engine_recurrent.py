"""Prefix reuse where a layer has a recurrent state: a row is reused whole, or not at all."""

from __future__ import annotations

import numpy as np
from prl.types import Completion
from prl_torch_engine.scheduler import Scheduler

from tests.plugins.tiny_engine import (
    VOCAB,
    chosen,
    finish,
    recurrent_model,
    reference_logprobs,
    request,
    scheduler,
)

PROMPT = [3, 7, 11, 2, 9, 30, 12, 5]
MODEL = recurrent_model()


def served(**options: int) -> Scheduler:
    return scheduler(MODEL, **options)


def assert_exact(prompt: list[int], completion: Completion) -> None:
    """Its log-probabilities are those of a fresh forward pass."""
    rows = reference_logprobs(MODEL, prompt, completion)
    np.testing.assert_allclose(completion.logprobs, chosen(rows, completion), atol=1e-5)


def run(engine: Scheduler, prompt: list[int], *, session: str = "") -> tuple[int, Completion]:
    (result,) = finish(engine, request("r", prompt, session=session, max_tokens=6)).values()
    (completion,) = result.completions
    assert_exact(prompt, completion)
    return result.reused_tokens, completion


def test_a_shared_beginning_is_not_reused() -> None:
    engine = served()
    assert [run(engine, prompt)[0] for prompt in (PROMPT, PROMPT, [*PROMPT[:5], 1, 1, 1])] == [0, 0, 0]


def test_a_prompt_that_extends_a_whole_row_goes_on_from_it() -> None:
    engine = served()
    assert run(engine, PROMPT)[0] == 0
    assert run(engine, [*PROMPT, 4, 8])[0] == len(PROMPT)


def test_the_next_turn_of_a_session_finds_the_turn_before_it() -> None:
    engine = served()
    _, completion = run(engine, PROMPT, session="s")
    extended = [*PROMPT, *completion.tokens.tolist(), 4, 8]
    assert run(engine, extended, session="s")[0] == len(PROMPT) + 6 - 1


def test_siblings_start_from_copies_of_one_prompt() -> None:
    engine = served(sequences=2, retained=2)
    (result,) = finish(engine, request("group", PROMPT, n=5, max_tokens=5)).values()
    assert len({tuple(completion.tokens) for completion in result.completions}) > 1
    for completion in result.completions:
        assert_exact(PROMPT, completion)


def test_many_prompts_through_few_rows() -> None:
    """Ends, moves of rows, chunks of prompts and turns mix; nothing of a row's past owner is left in its state."""
    engine = served(sequences=3, retained=2, prefill_tokens=5)
    draw = np.random.default_rng(0)
    prompts = [[*PROMPT[: draw.integers(1, 8)], *draw.integers(0, VOCAB, 3).tolist()] for _ in range(20)]
    requests = [
        request(str(i), p, seed=i, session=f"s{i % 4}" if i % 3 else "", n=1 + i % 3, max_tokens=1 + i % 6)
        for i, p in enumerate(prompts)
    ]
    results = finish(engine, *requests)
    for i, prompt in enumerate(prompts):
        for completion in results[str(i)].completions:
            assert_exact(prompt, completion)
