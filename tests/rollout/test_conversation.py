"""A conversation keeps exactly what was sampled, extends it turn by turn and stops where there is no room."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pytest
from prl.errors import UserError
from prl.providers import Score
from prl.rollout.conversation import Conversation, ConversationOver, Opening
from prl.rollout.policy import Policy, Siblings
from prl.types import Completion, Message, Rollout, Sampling, StopReason, Turn

END, ASSISTANT, USER = 0, 1, 2
SAMPLING = Sampling(max_tokens=16)
Hold = Callable[[Conversation], Awaitable[Any]]


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def opening(text: str) -> list[int]:
    return [USER, *map(ord, text), END, ASSISTANT]


def said(text: str) -> list[int]:
    return [*map(ord, text), END]


@pytest.fixture
def converse(engine: Any, renderer: Any) -> Callable[..., Any]:
    """`converse(hold, ...)`: hold one conversation with the engine and return it."""

    def run(hold: Hold, *, sampling: Sampling = SAMPLING, sequence_length: int = 64) -> Conversation:
        async def scenario() -> Conversation:
            async with asyncio.TaskGroup() as tasks:
                conversation = Conversation(
                    rollout_id="4.2",
                    renderer=renderer,
                    siblings=Siblings(Policy(lambda url, token: engine, ""), engine="http://e", tasks=tasks),
                    opening=Opening(renderer),
                    sampling=sampling,
                    sequence_length=sequence_length,
                )
                await hold(conversation)
            return conversation

        return asyncio.run(scenario())

    return run


@pytest.fixture
def script(engine: Any, completion: Callable[..., Completion]) -> Callable[..., None]:
    """`script(completion, ...)`: what the engine answers, in order."""

    def answer_with(*completions: Completion) -> None:
        answers = iter(completions)
        engine.reply = lambda prompt, sampling: next(answers)

    return answer_with


async def three_turns(conversation: Conversation) -> None:
    for text in ("one", "two", "three"):
        await conversation.ask([user(text)])


def test_every_prompt_extends_what_was_sampled_before(
    converse: Any, script: Any, completion: Callable[..., Completion], engine: Any
) -> None:
    script(completion("ab"), completion("c"), completion("def"))
    converse(three_turns)
    first, second, third = (list(asked.prompt) for asked in engine.asked)
    assert first == opening("one")
    assert second == first + said("ab") + opening("two")
    assert third == second + said("c") + opening("three")
    assert [asked.session for asked in engine.asked] == ["", "4.2", "4.2"]
    assert all(asked.stop == (END,) for asked in engine.asked)


def test_the_record_is_exact_in_every_column(converse: Any, script: Any, completion: Callable[..., Completion]) -> None:
    turns = [completion("ab", version=3), completion("c", version=4), completion("def", version=4)]
    script(*turns)
    rollout: Rollout = converse(three_turns).record(Score(reward=0.5, metrics={"accuracy": 1.0}))
    prompts = [opening("one"), opening("two"), opening("three")]
    parts = [part for prompt, turn in zip(prompts, turns, strict=True) for part in (prompt, turn.tokens.tolist())]
    assert rollout.tokens.tolist() == [*chain(*parts)]
    assert rollout.sampled.tolist() == [*chain(*([index % 2 == 1] * len(part) for index, part in enumerate(parts)))]
    assert rollout.logprobs[rollout.sampled].tolist() == [*chain(*(turn.logprobs.tolist() for turn in turns))]
    assert rollout.versions[rollout.sampled].tolist() == [3, 3, 3, 4, 4, 4, 4, 4, 4]
    assert not rollout.logprobs[~rollout.sampled].any()
    assert set(rollout.versions[~rollout.sampled].tolist()) == {-1}
    assert [(t.start, t.end) for t in rollout.turns] == [(6, 9), (15, 17), (25, 29)]
    assert [rollout.tokens[t.start : t.end].tolist() for t in rollout.turns] == [t.tokens.tolist() for t in turns]
    dtypes = (rollout.tokens.dtype, rollout.sampled.dtype, rollout.logprobs.dtype, rollout.versions.dtype)
    assert dtypes == (np.int32, np.bool_, np.float32, np.int32)
    assert [m["content"] for m in rollout.messages] == ["one", "ab", "two", "c", "three", "def"]
    assert (rollout.rollout_id, rollout.reward, rollout.metrics, rollout.temperature, rollout.oldest_version) == (
        "4.2",
        0.5,
        {"accuracy": 1.0},
        1.0,
        3,
    )


def test_sampled_tokens_are_never_encoded_again(converse: Any, script: Any, engine: Any) -> None:
    """Token 300 and what its text would encode to differ; the next prompt must carry the token."""
    odd = Completion(
        tokens=np.array([300, END], dtype=np.int32),
        logprobs=np.zeros(2, dtype=np.float32),
        versions=np.zeros(2, dtype=np.int32),
        stop=StopReason.STOP,
    )
    script(odd, odd)

    async def hold(conversation: Conversation) -> None:
        await conversation.ask([user("x")])
        await conversation.ask([user("y")])

    converse(hold)
    assert list(engine.asked[1].prompt) == [*opening("x"), 300, END, *opening("y")]


def test_a_turn_cut_by_max_tokens_is_closed_and_the_conversation_goes_on(
    converse: Any, script: Any, completion: Callable[..., Completion], engine: Any
) -> None:
    script(completion("abcd", stop=StopReason.LENGTH), completion("e"))

    async def hold(conversation: Conversation) -> None:
        await conversation.ask([user("x")])
        assert conversation.truncated
        assert not conversation.over
        await conversation.ask([user("y")])

    conversation = converse(hold, sampling=Sampling(max_tokens=4))
    assert list(engine.asked[1].prompt) == [*opening("x"), *map(ord, "abcd"), END, *opening("y")]
    assert [turn.stop for turn in conversation.turns] == [StopReason.LENGTH, StopReason.STOP]
    assert not conversation.truncated


def test_a_turn_may_use_the_room_that_is_left_and_no_more(
    converse: Any, script: Any, completion: Callable[..., Completion], engine: Any
) -> None:
    script(completion("ab"), completion("cdef", stop=StopReason.LENGTH))

    async def hold(conversation: Conversation) -> None:
        await conversation.ask([user("x")])
        await conversation.ask([user("y")])
        assert conversation.over
        await conversation.ask([user("z")])
        raise AssertionError("a third turn was held")

    with pytest.raises(BaseExceptionGroup) as caught:
        converse(hold, sampling=Sampling(max_tokens=8, min_tokens=6), sequence_length=15)
    assert caught.group_contains(ConversationOver)
    limits = [(asked.sampling.max_tokens, asked.sampling.min_tokens) for asked in engine.asked]
    assert limits == [(8, 6), (4, 4)]


@pytest.mark.parametrize("sequence_length", [7, 8, 11])
def test_without_room_the_conversation_is_over_and_truncated(
    converse: Any, script: Any, completion: Callable[..., Completion], engine: Any, sequence_length: int
) -> None:
    script(completion("ab"))

    async def hold(conversation: Conversation) -> None:
        await conversation.ask([user("x")])
        for _ in range(2):
            with pytest.raises(ConversationOver):
                await conversation.ask([user("y")])

    conversation = converse(hold, sequence_length=sequence_length)
    rollout = conversation.record(Score(reward=0.0))
    assert conversation.over
    assert rollout.truncated
    assert rollout.turns == (
        Turn(start=4, end=7, stop=StopReason.STOP),
        Turn(start=7, end=7, stop=StopReason.LENGTH),
    )
    assert rollout.tokens.tolist() == opening("x") + said("ab")
    assert rollout.sampled_count == 3
    assert [m["content"] for m in rollout.messages] == ["x", "ab"]
    assert len(engine.asked) == 1


def test_an_opening_without_room_for_a_reply_says_so(converse: Any) -> None:
    async def hold(conversation: Conversation) -> None:
        with pytest.raises(UserError, match=r"take 8 tokens.*sequence_length = 8"):
            await conversation.ask([user("12345")])

    assert converse(hold, sequence_length=8).turns == []


def test_turns_draw_from_seeds_of_their_own(converse: Any, engine: Any) -> None:
    conversation = converse(three_turns, sampling=Sampling(seed=11, max_tokens=16))
    drawn = [asked.sampling.seed for asked in engine.asked]
    assert drawn[0] == conversation.seed == 11
    assert len(set(drawn)) == 3
    assert all(0 <= seed < 2**63 for seed in drawn)
    engine.asked.clear()
    converse(three_turns, sampling=Sampling(seed=11, max_tokens=16))
    assert [asked.sampling.seed for asked in engine.asked] == drawn


def test_random_numbers_of_a_rollout_repeat_with_its_seed(converse: Any) -> None:
    def draw(seed: int) -> float:
        return float(converse(three_turns, sampling=Sampling(seed=seed)).rng.random())

    assert draw(1) == draw(1) != draw(2)


def test_a_turn_that_failed_leaves_no_trace(
    converse: Any, script: Any, completion: Callable[..., Completion], engine: Any
) -> None:
    script(completion("ab"), completion("c"))

    async def hold(conversation: Conversation) -> None:
        await conversation.ask([user("x")])
        engine.gate.clear()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await conversation.ask([user("slow")])
        engine.gate.set()
        await conversation.ask([user("y")])

    conversation = converse(hold)
    assert engine.aborted == 1
    assert list(engine.asked[-1].prompt) == opening("x") + said("ab") + opening("y")
    assert [m["content"] for m in conversation.messages] == ["x", "ab", "y", "c"]


def test_two_asks_at_once_are_refused(converse: Any, engine: Any) -> None:
    async def hold(conversation: Conversation) -> None:
        results = await asyncio.gather(
            conversation.ask([user("x")]), conversation.ask([user("y")]), return_exceptions=True
        )
        assert isinstance(results[1], RuntimeError)

    assert len(converse(hold).turns) == 1
    assert len(engine.asked) == 1


def test_siblings_share_the_rendering_of_equal_openings(renderer: Any) -> None:
    shared = Opening(renderer)
    assert shared.tokens([user("x")]) == shared.tokens((user("x"),)) == opening("x")
    assert renderer.started == 1
    assert shared.tokens([user("y")]) == opening("y")


def test_reply_is_what_the_policy_said_last(converse: Any, script: Any, completion: Callable[..., Completion]) -> None:
    script(completion("ab"), completion("cd"))
    replies: list[Sequence[str]] = []

    async def hold(conversation: Conversation) -> None:
        for text in ("x", "y"):
            reply = await conversation.ask([user(text)])
            replies.append((reply["content"], conversation.reply))

    converse(hold)
    assert replies == [("ab", "ab"), ("cd", "cd")]
