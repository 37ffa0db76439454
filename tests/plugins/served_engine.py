"""The embedded engine behind its HTTP server, in this process, with a real weight transport."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
from prl.blocks.decoder import Decoder
from prl.compose.routing import Routing
from prl.errors import UserError
from prl.serve.application import application, listening
from prl.serve.client import HttpEngineClient, connect
from prl.serve.speech import Speech
from prl.types import Manifest, Message
from prl_disk import DiskConfig
from prl_disk.files import receive, send
from prl_torch_engine.engine import Engine
from prl_torch_engine.generation import Generation
from prl_torch_engine.scheduler import Scheduler
from prl_torch_engine.weights import Weights
from torch import Tensor

from tests.plugins.tiny_engine import STOP, VOCAB, tiny_model

TOKEN = "the run's token"
ALPHABET = " abcdefghijklmnopqrstuvwxyz.,!?"


class SameNames:
    """A weight map for a model whose checkpoints use its own names."""

    def to_hf(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield name, tensor

    def from_hf(self, tensors: Mapping[str, Tensor], name: str) -> Tensor:
        return tensors[name]

    def hf_config(self) -> Mapping[str, Any]:
        return {}


class Letters:
    """Token 2 + i is the i-th letter; tokens 0 and 1 open and close what somebody says."""

    vocab_size = VOCAB

    def encode(self, text: str) -> list[int]:
        if strange := set(text) - set(ALPHABET):
            raise UserError(f"{strange} cannot be written with the alphabet")
        return [2 + ALPHABET.index(letter) for letter in text]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(ALPHABET[t - 2] if 2 <= t < 2 + len(ALPHABET) else f"<{t}>" for t in tokens)

    def special(self, token: str) -> int:
        return {"<open>": 0, "<close>": STOP}[token]


class LettersRenderer:
    stop_tokens = (STOP,)

    def start(self, messages: Sequence[Message]) -> list[int]:
        letters = Letters()
        return [t for m in messages for t in (0, *letters.encode(m["content"]), STOP)] + [0]

    def extend(self, messages: Sequence[Message], *, stopped: bool) -> list[int]:
        return [*([] if stopped else [STOP]), *self.start(messages)]

    def parse(self, completion: Sequence[int]) -> Message:
        return {"role": "assistant", "content": Letters().decode([t for t in completion if t != STOP])}

    def demonstration(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        raise NotImplementedError


@attrs.frozen(kw_only=True)
class Served:
    """A running engine and both ends of its weights."""

    url: str
    client: HttpEngineClient
    engine: Engine
    generation: Generation
    scheduler: Scheduler
    folder: Path

    def write(self, version: int, model: Decoder) -> Manifest:
        """What the trainer does at the end of a step."""
        return send(DiskConfig(), self.folder, 0).send(version, model.state_dict().items())

    async def update(self, version: int, model: Decoder) -> None:
        await self.client.prepare(self.write(version, model))
        await self.client.commit(version)

    async def until(self, name: str, least: float) -> None:
        """Ask until a statistic is at least `least`."""
        async with asyncio.timeout(60):
            while (await self.client.statistics())[name] < least:
                pass


@asynccontextmanager
async def serving(
    folder: Path,
    source: Decoder | None = None,
    *,
    empty: bool = False,
    sequences: int = 8,
    length: int = 256,
    routing: Routing | None = None,
) -> AsyncIterator[Served]:
    """An engine that serves version 0 of `source`, by default `tiny_model()`, or nothing yet when `empty`."""
    source = source or tiny_model()
    model = copy.deepcopy(source)
    for parameter in model.parameters():
        parameter.data.zero_()
    scheduler = Scheduler(model, sequences=sequences, retained=8, length=length, prefill_tokens=64, routing=routing)
    generation = Generation(scheduler)
    weights = Weights(model, SameNames(), receive(DiskConfig(), folder))
    engine = Engine(scheduler, generation, weights, vocab_size=VOCAB)
    speech = Speech(model="tiny", tokenizer=Letters(), renderer=LettersRenderer())
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(asyncio.to_thread(generation.run))
        try:
            async with listening(application(engine, speech, TOKEN), "127.0.0.1") as url:
                client = connect(url, TOKEN)
                served = Served(
                    url=url,
                    client=client,
                    engine=engine,
                    generation=generation,
                    scheduler=scheduler,
                    folder=folder,
                )
                try:
                    if not empty:
                        await served.update(0, source)
                    yield served
                finally:
                    await client.aclose()
        finally:
            generation.stop()
