"""Requests of siblings: one where they agree, the same tokens as separately, and nobody waits for a cancelled one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import pytest
from prl.errors import InfrastructureError
from prl.rollout.policy import EngineError, Policy, Siblings
from prl.types import Completion, Sampling, StopReason

URL = "http://engine"


def policy_of(engine: Any) -> Policy:
    return Policy(lambda url, token: engine, "token")


async def ask_together(engine: Any, samplings: Sequence[Sampling], prompts: Sequence[list[int]]) -> list[Completion]:
    async with asyncio.TaskGroup() as tasks:
        siblings = Siblings(policy_of(engine), engine=URL, tasks=tasks)
        asking = [
            tasks.create_task(siblings.first(prompt, sampling, stop=(0,)))
            for prompt, sampling in zip(prompts, samplings, strict=True)
        ]
    return [task.result() for task in asking]


def seeds(*values: int) -> list[Sampling]:
    return [Sampling(seed=value, max_tokens=16) for value in values]


def same(a: Completion, b: Completion) -> bool:
    return a.tokens.tolist() == b.tokens.tolist() and a.logprobs.tolist() == b.logprobs.tolist()


def test_siblings_are_one_request_with_the_tokens_of_separate_ones(engine: Any) -> None:
    together = asyncio.run(ask_together(engine, seeds(7, 8, 9, 10), [[5, 6]] * 4))
    assert [(asked.n, asked.sampling.seed, asked.session) for asked in engine.asked] == [(4, 7, "")]
    alone = [asyncio.run(ask_together(engine, [sampling], [[5, 6]]))[0] for sampling in seeds(7, 8, 9, 10)]
    assert [asked.n for asked in engine.asked[1:]] == [1, 1, 1, 1]
    assert all(map(same, together, alone))
    assert len({tuple(c.tokens.tolist()) for c in together}) > 1


@pytest.mark.parametrize(
    ("samplings", "prompts", "sizes"),
    [
        (seeds(1, 2, 4, 5), [[5]] * 4, [(1, 2), (4, 2)]),
        (seeds(1, 1, 2), [[5]] * 3, [(1, 1), (1, 2)]),
        (seeds(3, 2, 1), [[5]] * 3, [(1, 3)]),
        (seeds(1, 2, 3), [[5], [6], [6]], [(1, 1), (2, 2)]),
        ([*seeds(1), Sampling(seed=2, max_tokens=8)], [[5]] * 2, [(1, 1), (2, 1)]),
    ],
    ids=["gap", "equal seeds", "any order", "other prompt", "other sampling"],
)
def test_only_what_an_engine_would_sample_alike_is_shared(
    engine: Any, samplings: list[Sampling], prompts: list[list[int]], sizes: list[tuple[int, int]]
) -> None:
    answers = asyncio.run(ask_together(engine, samplings, prompts))
    assert [(asked.sampling.seed, asked.n) for asked in engine.asked] == sizes
    assert all(same(answer, engine.reply(p, s)) for answer, p, s in zip(answers, prompts, samplings, strict=True))


def test_one_cancelled_sibling_leaves_the_others_their_answers(engine: Any) -> None:
    async def scenario() -> tuple[list[Completion], bool]:
        engine.gate.clear()
        async with asyncio.TaskGroup() as tasks:
            siblings = Siblings(policy_of(engine), engine=URL, tasks=tasks)
            asking = [tasks.create_task(siblings.first([5], sampling, stop=(0,))) for sampling in seeds(0, 1, 2)]
            await engine.arrived.wait()
            asking[0].cancel()
            await asyncio.sleep(0)
            engine.gate.set()
        return [asking[1].result(), asking[2].result()], asking[0].cancelled()

    answers, cancelled = asyncio.run(scenario())
    assert cancelled
    assert engine.aborted == 0
    assert all(same(a, engine.reply([5], s)) for a, s in zip(answers, seeds(1, 2), strict=True))


def test_a_request_nobody_waits_for_is_aborted(engine: Any) -> None:
    async def scenario() -> None:
        engine.gate.clear()
        async with asyncio.TaskGroup() as tasks:
            siblings = Siblings(policy_of(engine), engine=URL, tasks=tasks)
            asking = [tasks.create_task(siblings.first([5], sampling, stop=(0,))) for sampling in seeds(0, 1)]
            await engine.arrived.wait()
            for task in asking:
                task.cancel()

    asyncio.run(scenario())
    assert engine.aborted == 1


def test_cancelled_before_it_was_sent_asks_nothing(engine: Any) -> None:
    async def scenario() -> None:
        async with asyncio.TaskGroup() as tasks:
            siblings = Siblings(policy_of(engine), engine=URL, tasks=tasks)
            asking = tasks.create_task(siblings.first([5], Sampling(), stop=(0,)))
            asyncio.get_running_loop().call_soon(asking.cancel)

    asyncio.run(scenario())
    assert engine.asked == []


def test_a_failure_reaches_every_sibling_of_the_request(engine: Any) -> None:
    engine.error = InfrastructureError("connection reset")

    async def scenario() -> list[Completion | BaseException]:
        async with asyncio.TaskGroup() as tasks:
            siblings = Siblings(policy_of(engine), engine=URL, tasks=tasks)
            asking = [siblings.first([5], sampling, stop=(0,)) for sampling in seeds(0, 1)]
            return await asyncio.gather(*asking, return_exceptions=True)

    answers = asyncio.run(scenario())
    assert [type(answer) for answer in answers] == [EngineError, EngineError]
    assert str(answers[0]) == "engine http://engine: connection reset"


def test_later_turns_go_alone_and_name_their_session(engine: Any) -> None:
    async def scenario() -> None:
        async with asyncio.TaskGroup() as tasks:
            siblings = Siblings(policy_of(engine), engine=URL, tasks=tasks)
            await asyncio.gather(
                *[siblings.later([5], s, stop=(0,), session=f"3.{i}") for i, s in enumerate(seeds(0, 1))]
            )

    asyncio.run(scenario())
    assert [(asked.n, asked.session) for asked in engine.asked] == [(1, "3.0"), (1, "3.1")]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"stop": StopReason.ABORT}, "aborted the request after 2 tokens"),
        ({"tokens": [], "logprobs": [], "versions": []}, "a completion without tokens"),
        ({"logprobs": [0.0]}, "columns differ in length"),
    ],
)
def test_what_an_engine_must_not_return_is_its_failure(
    engine: Any, completion: Callable[..., Completion], change: dict[str, Any], complaint: str
) -> None:
    engine.reply = lambda prompt, sampling: attrs.evolve(completion("a"), **change)
    with pytest.raises(EngineError, match=complaint):
        asyncio.run(policy_of(engine).generate([5], Sampling(), stop=(0,), engine=URL))


def test_one_client_per_engine_closed_at_the_end(engine: Any) -> None:
    connected: list[tuple[str, str]] = []

    def connect(url: str, token: str) -> Any:
        connected.append((url, token))
        return engine

    async def scenario() -> None:
        policy = Policy(connect, "secret")
        for url in ("http://a", "http://b", "http://a"):
            await policy.generate([5], Sampling(), stop=(0,), engine=url)
        await policy.aclose()

    asyncio.run(scenario())
    assert connected == [("http://a", "secret"), ("http://b", "secret")]
    assert engine.closed
