"""Continuous batching: tokens and log-probabilities do not depend on who else is in the batch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from prl.blocks.context import Context
from prl.blocks.decoder import Decoder
from prl.errors import InfrastructureError
from prl.types import StopReason

from tests.plugins.tiny_engine import (
    STOP,
    VOCAB,
    chosen,
    finish,
    recurrent_model,
    reference_logprobs,
    request,
    scheduler,
    tiny_model,
)

PROMPTS = [[2, 3, 4], [5], [7, 8, 9, 10, 11, 12, 13, 14, 15], [6, 6], [20, 21, 22, 23, 24]]


def test_greedy_tokens_are_the_most_likely_of_a_full_forward_pass() -> None:
    model = tiny_model()
    (result,) = finish(scheduler(model), request("r", [2, 3, 4], temperature=0.0, max_tokens=20)).values()
    (completion,) = result.completions
    rows = reference_logprobs(model, [2, 3, 4], completion)
    assert completion.tokens.tolist() == rows.argmax(1).tolist()
    assert len(set(completion.tokens.tolist())) > 3
    np.testing.assert_allclose(completion.logprobs, chosen(rows, completion), atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_logprobs_are_those_of_a_full_forward_pass_at_the_sampling_temperature(temperature: float) -> None:
    model = tiny_model()
    requests = [
        request(str(i), prompt, temperature=temperature, seed=i, max_tokens=20) for i, prompt in enumerate(PROMPTS)
    ]
    results = finish(scheduler(model), *requests)
    for i, prompt in enumerate(PROMPTS):
        (completion,) = results[str(i)].completions
        rows = reference_logprobs(model, prompt, completion, temperature)
        np.testing.assert_allclose(completion.logprobs, chosen(rows, completion), atol=1e-5)


def test_a_request_gets_the_same_tokens_alone_and_in_a_changing_batch() -> None:
    model = tiny_model()
    requests = [
        request(str(i), PROMPTS[i % len(PROMPTS)], seed=100 * i, max_tokens=5 + 3 * i, temperature=0.5 + 0.1 * i)
        for i in range(12)
    ]
    together = finish(scheduler(model, sequences=5, retained=3), *requests)
    for entry in requests:
        (alone,) = finish(scheduler(model), entry).values()
        batched = together[entry.request_id]
        assert batched.completions[0].tokens.tolist() == alone.completions[0].tokens.tolist()
        np.testing.assert_allclose(batched.completions[0].logprobs, alone.completions[0].logprobs, atol=1e-5)


def test_members_are_requests_with_consecutive_seeds() -> None:
    model = tiny_model()
    (group,) = finish(scheduler(model, sequences=3), request("g", [3, 4, 5], n=7, seed=40)).values()
    tokens = [completion.tokens.tolist() for completion in group.completions]
    for member in range(7):
        (single,) = finish(scheduler(model), request("s", [3, 4, 5], seed=40 + member)).values()
        assert tokens[member] == single.completions[0].tokens.tolist()
    assert len({tuple(t) for t in tokens}) > 3


def test_a_stop_token_ends_a_sequence_and_is_part_of_it() -> None:
    results = finish(scheduler(), *(request(str(i), [2, 3], stop=(STOP, 5), seed=i, max_tokens=40) for i in range(20)))
    completions = [result.completions[0] for result in results.values()]
    stopped = [c for c in completions if c.stop is StopReason.STOP]
    assert stopped
    assert all(c.tokens[-1] in (STOP, 5) for c in stopped)
    assert all(not np.isin(c.tokens[:-1], (STOP, 5)).any() for c in completions)
    assert all(len(c.tokens) == 40 for c in completions if c.stop is StopReason.LENGTH)


def test_before_min_tokens_no_stop_token_is_sampled_and_logprobs_are_renormalised() -> None:
    model, stop = tiny_model(), (STOP, 5, 9)
    requests = [request(str(i), PROMPTS[i % 5], stop=stop, seed=i, min_tokens=i % 7, max_tokens=9) for i in range(20)]
    results = finish(scheduler(model), *requests)
    for i, entry in enumerate(requests):
        (completion,) = results[str(i)].completions
        minimum = entry.sampling.min_tokens
        assert not np.isin(completion.tokens[:minimum], stop).any()
        rows = reference_logprobs(model, entry.prompt.tolist(), completion)
        rows[:minimum, stop] = -np.inf
        expected = chosen(torch.tensor(rows).log_softmax(1).numpy(), completion)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-5)


def test_a_sequence_ends_where_its_row_ends() -> None:
    model = tiny_model()
    (result,) = finish(scheduler(model, length=16), request("r", range(2, 12), max_tokens=100)).values()
    (completion,) = result.completions
    assert (len(completion.tokens), completion.stop) == (6, StopReason.LENGTH)
    rows = reference_logprobs(model, range(2, 12), completion)
    np.testing.assert_allclose(completion.logprobs, chosen(rows, completion), atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_policy_that_is_not_a_number_is_reported(temperature: float) -> None:
    model = tiny_model()
    model.norm.weight.fill_(torch.nan)
    with pytest.raises(InfrastructureError, match="logits are not finite at policy version 0: training has diverged"):
        finish(scheduler(model), request("r", [2, 3], temperature=temperature))


def test_one_token_requests_end_where_they_begin() -> None:
    results = finish(scheduler(sequences=2), *(request(str(i), [2 + i], max_tokens=1, n=3) for i in range(4)))
    assert [len(c.tokens) for r in results.values() for c in r.completions] == [1] * 12


@pytest.mark.parametrize("prefill_tokens", [1, 3, 7])
def test_prompts_computed_in_chunks_give_the_same_tokens(prefill_tokens: int) -> None:
    whole, chunked = scheduler(), scheduler(prefill_tokens=prefill_tokens)
    requests = [request(str(i), prompt, seed=i, n=2) for i, prompt in enumerate(PROMPTS)]
    expected, seen = finish(whole, *requests), finish(chunked, *requests)
    for name, result in expected.items():
        for a, b in zip(result.completions, seen[name].completions, strict=True):
            assert a.tokens.tolist() == b.tokens.tolist()
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@torch.inference_mode()
def test_long_prompts_do_not_hold_up_decoding() -> None:
    engine = scheduler(prefill_tokens=4)
    engine.add(request("short", [2, 3], max_tokens=10))
    engine.step()
    engine.add(request("long", [i % VOCAB for i in range(40)], max_tokens=1))
    before = engine.generated_tokens
    for _ in range(4):
        engine.step()
    assert engine.generated_tokens - before == 4


@torch.inference_mode()
def test_weights_replaced_midway_change_the_version_of_the_tokens_after_and_lose_nothing() -> None:
    engine = scheduler(sequences=4)
    for i in range(6):
        engine.add(request(str(i), PROMPTS[i % 5], seed=i, max_tokens=8))
    for version in (3, 4):
        for _ in range(3):
            engine.step()
        engine.set_version(version)
    results = finish(engine)
    assert len(results) == 6
    versions = [results[str(i)].completions[0].versions.tolist() for i in range(6)]
    assert versions[0] == [0] * 4 + [3] * 3 + [4]
    assert versions[5] == [4] * 8
    assert all(len(v) == 8 and v == sorted(v) for v in versions)


def test_running_sequences_keep_the_keys_and_values_of_the_old_weights() -> None:
    model = tiny_model(0)
    engine = scheduler(model)
    engine.add(request("r", PROMPTS[2], max_tokens=20))
    with torch.inference_mode():
        for _ in range(7):
            engine.step()
    model.load_state_dict(tiny_model(1).state_dict())
    engine.set_version(1)
    (completion,) = finish(engine)["r"].completions
    assert completion.versions.tolist() == [0] * 8 + [1] * 12

    computed_before = len(PROMPTS[2]) + 7  # the eighth token was sampled by the old weights, computed by the new
    tokens = torch.tensor([*PROMPTS[2], *completion.tokens.tolist()])
    caches = model.new_caches(1, 64)
    logits = []
    for weights, start, end in ((tiny_model(0), 0, computed_before), (tiny_model(1), computed_before, len(tokens))):
        context = Context.cached(caches, lengths=[end - start], rows=slice(0, 1), past=[start])
        logits.append(weights.hidden(tokens[start:end], context) @ weights.head().T)
    rows = torch.cat(logits)[len(PROMPTS[2]) - 1 : -1].log_softmax(1).numpy()
    np.testing.assert_allclose(completion.logprobs, chosen(rows, completion), atol=1e-5)


@torch.inference_mode()
def test_abort_returns_the_tokens_so_far_and_frees_the_rows() -> None:
    engine = scheduler(sequences=4, prefill_tokens=8)
    engine.add(request("a", [2, 3], n=3, max_tokens=30))
    engine.add(request("b", [4, 5], n=3, max_tokens=6, seed=7))
    engine.step()
    engine.step()
    assert engine.abort("a")
    assert not engine.abort("a")
    assert not engine.abort("never seen")
    results = finish(engine)
    assert [len(c.tokens) for c in results["a"].completions] == [3, 3, 3]
    assert {c.stop for c in results["a"].completions} == {StopReason.ABORT}
    (expected,) = finish(scheduler(), request("b", [4, 5], n=3, max_tokens=6, seed=7)).values()
    for seen, alone in zip(results["b"].completions, expected.completions, strict=True):
        assert seen.tokens.tolist() == alone.tokens.tolist()
    assert (len(engine.batch), engine.waiting) == (0, 0)


@torch.inference_mode()
def test_what_a_request_has_so_far_is_gone_on_with_to_the_same_end() -> None:
    """In another engine: a token depends on the seed and its place. One member has ended, one waits for a row."""
    prompt, whole = [2, 3], request("a", [2, 3], n=3, max_tokens=12, stop=(1, 2, 3, 4), seed=3)
    (expected,) = finish(scheduler(), whole).values()
    assert [len(completion.tokens) for completion in expected.completions] == [12, 3, 12]
    engine = scheduler(sequences=2)
    engine.add(whole)
    engine.step()
    engine.step()
    so_far = engine.so_far("a").completions
    assert (engine.so_far("never seen").completions, engine.take()[0]) == ((), [])
    for member, (begun, end) in enumerate(zip(so_far, expected.completions, strict=True)):
        count = len(begun.tokens)
        rest = request("r", [*prompt, *begun.tokens], max_tokens=12 - count, stop=whole.stop, seed=3 + member)
        more = finish(scheduler(), rest)["r"].completions[0].tokens if begun.stop is StopReason.ABORT else []
        assert [*begun.tokens, *more] == end.tokens.tolist()
        np.testing.assert_allclose(begun.logprobs, end.logprobs[:count], atol=1e-5)
    assert {completion.stop for completion in so_far} == {StopReason.STOP, StopReason.ABORT}
    seen = finish(engine)["a"].completions
    assert [c.tokens.tolist() for c in seen] == [c.tokens.tolist() for c in expected.completions]


@torch.inference_mode()
def test_abort_of_a_request_that_waits_or_whose_prompt_is_being_computed() -> None:
    engine = scheduler(sequences=1, prefill_tokens=2)
    engine.add(request("computed", [2, 3, 4, 5, 6]))
    engine.add(request("waits", [2], n=2))
    engine.step()
    assert engine.abort("computed")
    assert engine.abort("waits")
    results, _ = engine.take()
    assert [[len(c.tokens) for c in r.completions] for r in results] == [[0], [0, 0]]
    assert not engine.busy
    assert len(finish(engine, request("next", [2, 3]))["next"].completions[0].tokens) == 12


@pytest.mark.parametrize("make", [tiny_model, recurrent_model])
@torch.inference_mode()
def test_a_prompt_that_saw_an_update_is_computed_by_the_new_weights_alone(make: Callable[[int], Decoder]) -> None:
    model, new = make(0), make(1)
    engine = scheduler(model, prefill_tokens=3)
    finish(engine, request("before", PROMPTS[2], max_tokens=1))
    long = [*PROMPTS[2], *PROMPTS[4]]
    engine.add(request("r", long, max_tokens=6))
    engine.step()
    model.load_state_dict(new.state_dict())
    engine.set_version(1)
    result = finish(engine)["r"]
    (completion,) = result.completions
    assert completion.versions.tolist() == [1] * 6
    assert (result.reused_tokens, engine.reused_tokens) == (0, 0)
    rows = reference_logprobs(new, long, completion)
    np.testing.assert_allclose(completion.logprobs, chosen(rows, completion), atol=1e-5)
