"""Continuations in pieces, one for each version: what is asked for, and what the pieces become."""

from __future__ import annotations

import asyncio

import numpy as np
from prl.types import Completion, Sampling, StopReason
from prl_vllm.api import Answer, Ask
from prl_vllm.segments import in_segments

ASK = Ask(
    request_id="r",
    prompt=[5, 6],
    sampling=Sampling(max_tokens=6, min_tokens=3, seed=7),
    n=2,
    stop=[1],
    salt="version-0",
)


def piece(tokens: list[int], version: int, stop: StopReason) -> Completion:
    count = len(tokens)
    return Completion(
        tokens=np.array(tokens, np.int32),
        logprobs=-np.array(tokens, np.float32),
        versions=np.full(count, version, np.int32),
        stop=stop,
    )


class Server:
    """Answers in the order it is asked, and remembers what it was asked."""

    def __init__(self, *answers: list[Completion]) -> None:
        self.answers = list(answers)
        self.asked: list[Ask] = []

    async def send(self, ask: Ask) -> Answer:
        self.asked.append(ask)
        return Answer(completions=tuple(self.answers.pop(0)), prompt_tokens=len(ask.prompt), reused_tokens=0)


def test_what_updates_cut_goes_on_from_there() -> None:
    server = Server(
        [piece([10, 11], 0, StopReason.ABORT), piece([20, 1], 0, StopReason.STOP)],
        [piece([12], 1, StopReason.ABORT)],
        [piece([13, 14, 15], 2, StopReason.LENGTH)],
    )
    answer = asyncio.run(in_segments(ASK, server.send, frozenset()))
    cut, whole = answer.completions
    assert cut.tokens.tolist() == [10, 11, 12, 13, 14, 15]
    assert cut.logprobs.tolist() == [-10, -11, -12, -13, -14, -15]
    assert cut.versions.tolist() == [0, 0, 1, 2, 2, 2]
    assert (cut.stop, whole.stop) == (StopReason.LENGTH, StopReason.STOP)
    assert whole.tokens.tolist() == [20, 1]
    assert answer.prompt_tokens == 2
    _, second, third = server.asked
    assert (second.prompt, third.prompt) == ([5, 6, 10, 11], [5, 6, 10, 11, 12])
    assert [(ask.sampling.max_tokens, ask.sampling.min_tokens, ask.n) for ask in (second, third)] == [
        (4, 1, 1),
        (3, 0, 1),
    ]
    assert len({ask.sampling.seed for ask in server.asked}) == 3


def test_what_somebody_ends_stays_ended() -> None:
    server = Server([piece([10], 0, StopReason.ABORT), piece([], 0, StopReason.ABORT)])
    answer = asyncio.run(in_segments(ASK, server.send, {"r"}))
    assert [completion.tokens.tolist() for completion in answer.completions] == [[10], []]
