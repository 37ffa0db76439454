"""Prefix reuse: what was computed for one request serves the next, until the weights change."""

from __future__ import annotations

import numpy as np
import torch
from prl_torch_engine.scheduler import Scheduler

from tests.plugins.tiny_engine import VOCAB, chosen, finish, reference_logprobs, request, scheduler, tiny_model

PROMPT = [3, 7, 11, 2, 9, 30, 12, 5]


def reused_by(engine: Scheduler, prompt: list[int], *, session: str = "", max_tokens: int = 6) -> int:
    """Run one request, check its log-probabilities against a fresh forward pass, and say how much it found cached."""
    (result,) = finish(engine, request("r", prompt, session=session, max_tokens=max_tokens)).values()
    (completion,) = result.completions
    rows = reference_logprobs(tiny_model(), prompt, completion)
    np.testing.assert_allclose(completion.logprobs, chosen(rows, completion), atol=1e-5)
    return result.reused_tokens


def test_the_same_prompt_is_computed_once_but_for_its_last_token() -> None:
    engine = scheduler()
    assert [reused_by(engine, PROMPT) for _ in range(3)] == [0, 7, 7]
    assert (engine.prompt_tokens, engine.reused_tokens) == (24, 14)


def test_a_shared_beginning_is_reused_by_another_prompt() -> None:
    engine = scheduler()
    assert reused_by(engine, PROMPT) == 0
    assert reused_by(engine, [*PROMPT[:5], 1, 1, 1]) == 5
    assert reused_by(engine, PROMPT) == 7  # the first prompt's row was copied, not cut


def test_the_next_turn_of_a_session_finds_the_turn_before_it() -> None:
    engine = scheduler()
    first = request("first", PROMPT, session="s", max_tokens=10, seed=3)
    (completion,) = finish(engine, first)["first"].completions
    extended = [*PROMPT, *completion.tokens.tolist(), 4, 8]
    # All of the first turn but its last token, which was sampled and never computed.
    assert reused_by(engine, extended, session="s") == len(PROMPT) + 10 - 1


def test_without_a_session_only_the_prompt_is_kept() -> None:
    engine = scheduler()
    (completion,) = finish(engine, request("first", PROMPT, max_tokens=10))["first"].completions
    assert reused_by(engine, [*PROMPT, *completion.tokens.tolist(), 4]) == len(PROMPT)


def test_turns_of_many_sessions_do_not_mix() -> None:
    engine = scheduler(sequences=4, retained=6)
    prompts = {str(i): [*PROMPT, i] for i in range(5)}
    for turn in range(3):
        requests = [request(s, p, session=s, seed=10 * turn + int(s), max_tokens=5) for s, p in prompts.items()]
        results = finish(engine, *requests)
        for session, prompt in prompts.items():
            (completion,) = results[session].completions
            rows = reference_logprobs(tiny_model(), prompt, completion)
            np.testing.assert_allclose(completion.logprobs, chosen(rows, completion), atol=1e-5)
            assert results[session].reused_tokens >= (len(prompt) - 2 if turn else 0)
            prompts[session] = [*prompt, *completion.tokens.tolist(), 6]


@torch.inference_mode()
def test_a_running_sequence_lends_its_prefix() -> None:
    engine = scheduler(retained=1)
    engine.add(request("running", PROMPT, max_tokens=40))
    engine.step()
    engine.add(request("other", [1, 2], max_tokens=1))  # takes the only prompt row
    engine.step()
    results = finish(engine, request("late", [*PROMPT[:7], 1, 1], max_tokens=2))
    assert results["late"].reused_tokens == 7


def test_new_weights_make_everything_before_them_useless() -> None:
    engine = scheduler()
    assert [reused_by(engine, PROMPT, session="s") for _ in range(2)] == [0, 7]
    engine.set_version(1)
    assert [reused_by(engine, PROMPT, session="s") for _ in range(2)] == [0, 7]


@torch.inference_mode()
def test_a_sequence_that_saw_an_update_lends_nothing() -> None:
    engine = scheduler()
    engine.add(request("spans", PROMPT, session="s", max_tokens=20))
    engine.step()
    engine.set_version(1)
    results = finish(engine, request("new", PROMPT, session="s", max_tokens=4))
    assert results["spans"].completions[0].versions.tolist() == [0] * 2 + [1] * 18
    assert results["new"].reused_tokens == 0
    assert reused_by(engine, PROMPT) == 7  # from "new", which was computed under the new weights alone


def test_members_beyond_the_free_rows_reuse_their_prompt() -> None:
    engine = scheduler(sequences=2, retained=2)
    (result,) = finish(engine, request("group", PROMPT, n=6, max_tokens=5)).values()
    for completion in result.completions:
        rows = reference_logprobs(tiny_model(), PROMPT, completion)
        np.testing.assert_allclose(completion.logprobs, chosen(rows, completion), atol=1e-5)
    assert (engine.prompt_tokens, engine.reused_tokens) == (8, 0)  # counted once for the request


def test_many_prompts_through_few_rows() -> None:
    engine = scheduler(sequences=3, retained=2)
    draw = np.random.default_rng(0)
    prompts = [[*PROMPT[: draw.integers(1, 8)], *draw.integers(0, VOCAB, 3).tolist()] for _ in range(25)]
    requests = [
        request(str(i), p, seed=i, session=f"s{i % 4}" if i % 3 else "", n=1 + i % 3, max_tokens=1 + i % 6)
        for i, p in enumerate(prompts)
    ]
    results = finish(engine, *requests)
    for i, prompt in enumerate(prompts):
        for completion in results[str(i)].completions:
            rows = reference_logprobs(tiny_model(), prompt, completion)
            np.testing.assert_allclose(completion.logprobs, chosen(rows, completion), atol=1e-5)
    assert engine.reused_tokens > 0
