"""An engine that samples by rule, a renderer whose tokens are characters, and a run made of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from types import SimpleNamespace
from typing import Any

import attrs
import numpy as np
import pytest
from prl.compose.config import (
    EngineConfig,
    EnvironmentConfig,
    ModelConfig,
    RolloutSection,
    RunSection,
    TokenizerSection,
    TrainerSection,
)
from prl.providers import Engine, Environment, Model, Provider, Score
from prl.rollout.conversation import Conversation
from prl.types import Completion, Message, Sampling, Split, StopReason, Task, as_tokens

END, ASSISTANT, USER = 0, 1, 2


def completion_of(text: str, *, version: int = 0, stop: StopReason = StopReason.STOP) -> Completion:
    """`text` as sampled characters, closed by END when it stopped; every logprob is another number."""
    tokens = as_tokens([*map(ord, text), *([END] if stop is StopReason.STOP else [])])
    return Completion(
        tokens=tokens,
        logprobs=-(np.arange(len(tokens), dtype=np.float32) + 1 + version) / 8,
        versions=np.full(len(tokens), version, dtype=np.int32),
        stop=stop,
    )


def random_completion(prompt: Sequence[int], sampling: Sampling) -> Completion:
    """A pure function of prompt and seed, as an engine's sampling is."""
    rng = Random(repr((tuple(prompt), sampling.seed)))
    text = "".join(rng.choice("abcdef") for _ in range(rng.randint(1, 6)))
    return completion_of(text[: sampling.max_tokens - 1])


@attrs.frozen
class Asked:
    prompt: tuple[int, ...]
    sampling: Sampling
    stop: tuple[int, ...]
    n: int
    session: str
    routes_from: int | None = None


@attrs.define(eq=False)
class FakeEngine:
    """Answers with `reply(prompt, sampling)`, member `i` with `seed + i`, once `gate` is open; `error` is raised."""

    reply: Callable[[Sequence[int], Sampling], Completion] = random_completion
    error: Exception | None = None
    asked: list[Asked] = attrs.field(factory=list)
    gate: asyncio.Event = attrs.field(factory=asyncio.Event)
    arrived: asyncio.Event = attrs.field(factory=asyncio.Event)
    aborted: int = 0
    closed: bool = False

    def __attrs_post_init__(self) -> None:
        self.gate.set()

    async def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        stop: Sequence[int],
        n: int = 1,
        session: str = "",
        routes_from: int | None = None,
    ) -> list[Completion]:
        self.asked.append(Asked(tuple(prompt), sampling, tuple(stop), n, session, routes_from))
        self.arrived.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        if self.error is not None:
            raise self.error
        return [self.reply(prompt, attrs.evolve(sampling, seed=sampling.seed + i)) for i in range(n)]

    async def aclose(self) -> None:
        self.closed = True


class CharacterRenderer:
    """`USER text END` for a message, `ASSISTANT` where the policy begins to speak."""

    stop_tokens = (END,)

    def __init__(self) -> None:
        self.started = 0

    def start(self, messages: Sequence[Message]) -> list[int]:
        self.started += 1
        return [*self._said(messages), ASSISTANT]

    def extend(self, messages: Sequence[Message], *, stopped: bool) -> list[int]:
        return [*([] if stopped else [END]), *self._said(messages), ASSISTANT]

    def parse(self, completion: Sequence[int]) -> Message:
        return {"role": "assistant", "content": "".join(chr(t) for t in completion if t != END)}

    def demonstration(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        tokens: list[int] = []
        said: list[bool] = []
        for message in messages:
            spoken = message["role"] == "assistant"
            text = [*map(ord, message["content"]), END]
            tokens += [ASSISTANT if spoken else USER, *text]
            said += [False, *[spoken] * len(text)]
        return tokens, said

    def _said(self, messages: Sequence[Message]) -> list[int]:
        return [token for m in messages for token in (USER, *map(ord, m["content"]), END)]


async def say_hello(task: Task, conversation: Conversation) -> None:
    await conversation.ask(task.messages)


async def length_of_reply(task: Task, conversations: Sequence[Conversation]) -> list[Score]:
    return [Score(reward=float(len(conversation.reply))) for conversation in conversations]


@attrs.define(eq=False, slots=False)
class FakeEnvironment:
    """Four training tasks and two held-out ones; what it does is what a test puts in."""

    hold: Callable[[Task, Conversation], Awaitable[None]] = say_hello
    judge: Callable[[Task, Sequence[Conversation]], Awaitable[Sequence[Score]]] = length_of_reply
    solution: str | None = "ab"
    seed: int = -1
    closed: bool = False

    def size(self, split: Split) -> int:
        return {"train": 4, "eval": 2}[split]

    def task(self, split: Split, index: int) -> Task:
        return Task(index=index, messages=({"role": "user", "content": f"{split}{index}"},))

    async def rollout(self, task: Task, conversation: Conversation) -> None:
        await self.hold(task, conversation)

    async def score(self, task: Task, conversations: Sequence[Conversation]) -> Sequence[Score]:
        return await self.judge(task, conversations)

    def demonstration(self, task: Task) -> list[Message] | None:
        if self.solution is None:
            return None
        return [*task.messages, {"role": "assistant", "content": self.solution}]

    async def aclose(self) -> None:
        self.closed = True


class FakeEnvironmentConfig(EnvironmentConfig):
    """Runs in workers."""


class CheapEnvironmentConfig(EnvironmentConfig):
    """Runs in the controller."""


@attrs.define(eq=False)
class FakeComposition:
    """A composition of one model, one engine and two environments, `fake` and the cheap `light`."""

    run: Any
    parts: dict[str, Any]
    providers: dict[type, Provider]

    def provider(self, section: Any) -> Provider:
        return self.providers[type(section)]

    def load(self, ref: str) -> Any:
        return self.parts[ref]

    def build(self, section: Any, *args: Any) -> Any:
        return self.parts[getattr(self.provider(section), "build")](section, *args)  # noqa: B009


def _providers() -> dict[type, Provider]:
    model = Model(
        name="m", config=ModelConfig, summary="", build="", weights="", render="m:render", special_tokens=("<end>",)
    )
    engine = Engine(name="e", config=EngineConfig, summary="", serve="", connect="e:connect")
    fake = Environment(name="fake", config=FakeEnvironmentConfig, summary="", build="fake:build")
    light = Environment(name="light", config=CheapEnvironmentConfig, summary="", build="light:build", cheap=True)
    return {provider.config: provider for provider in (model, engine, fake, light)}


@pytest.fixture
def environment() -> FakeEnvironment:
    return FakeEnvironment()


@pytest.fixture
def composition(engine: FakeEngine, renderer: CharacterRenderer, environment: FakeEnvironment) -> FakeComposition:
    run = SimpleNamespace(
        run=RunSection(steps=1, seed=5),
        model=ModelConfig(),
        tokenizer=TokenizerSection(characters="abcdef0123456789"),
        engine=EngineConfig(),
        environments=(FakeEnvironmentConfig(name="fake"), CheapEnvironmentConfig(name="light")),
        rollouts=RolloutSection(sequence_length=32),
        trainer=TrainerSection(),
    )

    def build(section: Any, seed: int) -> FakeEnvironment:
        environment.seed = seed
        return environment

    parts = {
        "m:render": lambda config, tokenizer: renderer,
        "e:connect": lambda url, token: engine,
        "fake:build": build,
        "light:build": lambda section, seed: FakeEnvironment(),
    }
    return FakeComposition(run=run, parts=parts, providers=_providers())


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def renderer() -> CharacterRenderer:
    return CharacterRenderer()


@pytest.fixture
def completion() -> Callable[..., Completion]:
    return completion_of
