"""The OpenAI endpoint, talked to with the public `openai` client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from prl.types import Sampling

from tests.plugins.served_engine import TOKEN, Letters, LettersRenderer, Served, serving
from tests.plugins.tiny_engine import STOP, tiny_model

MESSAGES = [{"role": "user", "content": "hello"}]
PROMPT = LettersRenderer().start(MESSAGES)


def talking(folder: Path, test: Callable[[Served, openai.AsyncOpenAI], Awaitable[None]], token: str = TOKEN) -> None:
    async def run() -> None:
        async with (
            serving(folder) as engine,
            openai.AsyncOpenAI(base_url=engine.url + "/v1", api_key=token, max_retries=0) as client,
        ):
            await test(engine, client)

    asyncio.run(run())


def test_a_chat_completion_is_the_generation_of_the_rendered_messages(tmp_path: Path) -> None:
    async def test(engine: Served, client: openai.AsyncOpenAI) -> None:
        answer = await client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,  # type: ignore[arg-type]
            max_tokens=12,
            temperature=0.8,
            seed=3,
            n=2,
            logprobs=True,
            extra_body={"return_token_ids": True},
        )
        sampling = Sampling(temperature=0.8, max_tokens=12, seed=3)
        expected = await engine.client.generate(PROMPT, sampling, stop=[STOP], n=2)
        assert answer.model_extra == {"prompt_token_ids": PROMPT}
        for choice, completion in zip(answer.choices, expected, strict=True):
            tokens = completion.tokens.tolist()
            assert choice.model_extra == {"token_ids": tokens}
            assert choice.message.role == "assistant"
            assert choice.message.content == Letters().decode([t for t in tokens if t != STOP])
            assert choice.finish_reason == completion.stop.value
            assert choice.logprobs is not None
            assert choice.logprobs.content is not None
            seen = [entry.logprob for entry in choice.logprobs.content]
            np.testing.assert_allclose(seen, completion.logprobs, atol=1e-6)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(PROMPT)
        assert answer.usage.completion_tokens == sum(len(c.tokens) for c in expected)

    talking(tmp_path, test)


def test_streamed_pieces_make_up_the_completion(tmp_path: Path) -> None:
    async def test(engine: Served, client: openai.AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,  # type: ignore[arg-type]
            max_completion_tokens=60,
            seed=3,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
        texts, reasons, total = {0: "", 1: ""}, {}, 0
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                if choice.finish_reason:
                    reasons[choice.index] = choice.finish_reason
            total = chunk.usage.completion_tokens if chunk.usage else total
        expected = await engine.client.generate(PROMPT, Sampling(max_tokens=60, seed=3), stop=[STOP], n=2)
        for index, completion in enumerate(expected):
            assert texts[index] == LettersRenderer().parse(completion.tokens.tolist())["content"]
            assert reasons[index] == completion.stop.value
        assert total == sum(len(c.tokens) for c in expected)

    talking(tmp_path, test)


def test_closing_a_stream_aborts_the_request(tmp_path: Path) -> None:
    async def test(engine: Served, client: openai.AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,  # type: ignore[arg-type]
            stream=True,
            n=20,
            extra_body={"min_tokens": 200},
        )
        await anext(aiter(stream))
        await engine.client.pause()
        await stream.close()
        async with asyncio.timeout(60):
            while (statistics := await engine.client.statistics())["running"] + statistics["waiting"]:
                pass

    talking(tmp_path, test)


def test_the_model_is_listed(tmp_path: Path) -> None:
    async def test(engine: Served, client: openai.AsyncOpenAI) -> None:
        assert [(model.id, model.model_extra) async for model in client.models.list()] == [
            ("tiny", {"max_model_len": 256, "version": 0})
        ]

    talking(tmp_path, test)


def test_a_version_can_be_asked_for_by_name_while_it_is_served(tmp_path: Path) -> None:
    async def test(engine: Served, client: openai.AsyncOpenAI) -> None:
        ask: Any = {"messages": MESSAGES, "max_tokens": 4}
        answer = await client.chat.completions.create(model="tiny@0", **ask)
        streamed = [event async for event in await client.chat.completions.create(model="tiny@0", stream=True, **ask)]
        assert {answer.model, *(event.model for event in streamed)} == {"tiny@0"}
        assert streamed[-1].choices[0].finish_reason is not None
        await engine.update(1, tiny_model(seed=1))
        with pytest.raises(openai.NotFoundError, match="version 0 is not served here; this engine serves tiny@1"):
            await client.chat.completions.create(model="tiny@0", **ask)
        assert (await client.chat.completions.create(model="tiny", **ask)).model == "tiny"

    talking(tmp_path, test)


def test_no_answer_mixes_another_version_with_the_one_asked_for(tmp_path: Path) -> None:
    """The update comes while the engine is paused with both requests in it."""

    async def test(engine: Served, client: openai.AsyncOpenAI) -> None:
        ask: Any = {"messages": MESSAGES, "max_tokens": 8, "extra_body": {"min_tokens": 8}}
        await engine.client.pause()
        async with asyncio.TaskGroup() as tasks:
            whole = tasks.create_task(refused(client.chat.completions.create(model="tiny@0", **ask)))
            events = tasks.create_task(refused(read(client, model="tiny@0", stream=True, **ask)))
            await engine.until("waiting", 2)
            await engine.update(1, tiny_model(seed=1))
            await engine.client.resume()
        for sentence in (whole.result(), events.result()):
            assert "version 0 gave way to version 1 before the answer was finished" in sentence

    talking(tmp_path, test)


async def read(client: openai.AsyncOpenAI, **ask: Any) -> None:
    async for _ in await client.chat.completions.create(**ask):
        pass


async def refused(asked: Awaitable[Any]) -> str:
    with pytest.raises(openai.APIError) as caught:
        await asked
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"top_p": 0.5}, openai.BadRequestError, "top_p must be 1 or absent: the policy is sampled as it is"),
        ({"stop": ["x"]}, openai.BadRequestError, "stop is not supported by this engine; leave it out"),
        ({"model": "gpt"}, openai.NotFoundError, "the model 'gpt' does not exist; this engine serves 'tiny'"),
        ({"messages": []}, openai.BadRequestError, "messages must be a list of objects"),
        (
            {"messages": [{"role": "user", "content": "É"}]},
            openai.BadRequestError,
            "the messages cannot be rendered: {'É'} cannot be written with the alphabet",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            openai.BadRequestError,
            "content.type must be 'text'",
        ),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path: Path, change: dict, error: type, sentence: str) -> None:  # type: ignore[type-arg]
    async def test(engine: Served, client: openai.AsyncOpenAI) -> None:
        with pytest.raises(error) as caught:
            await client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **change})
        assert sentence in str(caught.value)

    talking(tmp_path, test)


def test_neutral_fields_and_text_parts_are_accepted(tmp_path: Path) -> None:
    async def test(engine: Served, client: openai.AsyncOpenAI) -> None:
        plain = {"model": "tiny", "seed": 1, "max_tokens": 5}
        parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
        one = await client.chat.completions.create(messages=MESSAGES, **plain)  # type: ignore[call-overload]
        two = await client.chat.completions.create(  # type: ignore[call-overload]
            messages=parts, top_p=1, presence_penalty=0, user="somebody", **plain
        )
        assert one.choices[0].message.content == two.choices[0].message.content

    talking(tmp_path, test)


def test_the_wrong_key_is_an_authentication_error(tmp_path: Path) -> None:
    async def test(engine: Served, client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.AuthenticationError, match="send the run's token"):
            await client.chat.completions.create(model="tiny", messages=MESSAGES)  # type: ignore[arg-type]

    talking(tmp_path, test, token="wrong")
