"""The engine process of a real composition: what the trainer publishes is what it samples from."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import openai
import torch
from prl.blocks.context import Context
from prl.compose.compose import Composition, compose, create_run
from prl.dispatch.hub import Hub
from prl.messages import Stop
from prl.providers import EngineClient
from prl.run_dir import RunDir
from prl.types import Sampling
from prl.weights.engines import main
from torch import nn

CONFIG = Path(__file__).parents[2] / "configs" / "guessing.toml"
SPECIALS = 3


class Trainer:
    """The trainer's side of a version: fresh weights, sent through the run's transport."""

    def __init__(self, composition: Composition, run_dir: RunDir) -> None:
        run, provider = composition.run, composition.provider(composition.run.model)
        self.vocab_size = len(run.tokenizer.characters) + SPECIALS
        torch.manual_seed(1)
        self.model: nn.Module = composition.build(run.model, self.vocab_size)
        self._weights = composition.load(provider.weights)(run.model, self.vocab_size)  # type: ignore[attr-defined]
        self._format = composition.build(run.quantization)
        send = composition.load(composition.provider(run.weights).send)  # type: ignore[attr-defined]
        self.sender = send(run.weights, run_dir.path, 0)

    async def publish(self, client: EngineClient, version: int) -> None:
        named = (
            sent
            for name, tensor in self.model.named_parameters()
            for stored, part in self._weights.to_hf(name, tensor.detach())
            for sent in self._format.export(stored, part)
        )
        await client.prepare(self.sender.send(version, named))
        await client.commit(version)

    @torch.no_grad()
    def logprobs(self, prompt: list[int], tokens: list[int]) -> np.ndarray:
        """[tokens] what the trainer gives each of them."""
        sequence = torch.tensor(prompt + tokens)
        hidden = self.model.hidden(sequence, Context.packed(torch.tensor([0, len(sequence)])))  # type: ignore[operator]
        rows = (hidden @ self.model.head().T).log_softmax(1)[len(prompt) - 1 : -1]  # type: ignore[operator]
        values: np.ndarray = rows.gather(1, torch.tensor(tokens)[:, None])[:, 0].numpy()
        return values


def running(folder: Path, test: Callable[[EngineClient, str, str, Trainer], Awaitable[None]]) -> int:
    """Engine 0 of a run, in a thread beside a controller's hub; its exit code after Stop."""
    composition = compose(CONFIG, overrides=[f'run.dir="{folder}"', "model.layers=2", "engine.sequences=16"])
    run_dir = create_run(composition, CONFIG)
    trainer = Trainer(composition, run_dir)

    async def run() -> int:
        async with asyncio.timeout(120), Hub(run_dir) as hub, asyncio.TaskGroup() as tasks:
            engine = tasks.create_task(asyncio.to_thread(main, composition, run_dir, 0))
            serving = tasks.create_task(hub.serve())
            peer, hello = await hub.hello("engine", 0)
            provider = composition.provider(composition.run.engine)
            client = composition.load(provider.connect)(hello.url, run_dir.token())  # type: ignore[attr-defined]
            try:
                await test(client, hello.url, run_dir.token(), trainer)
            finally:
                await client.aclose()
                await hub.send(peer, Stop())
            code = await engine
            serving.cancel()
            return code

    try:
        return asyncio.run(run())
    finally:
        trainer.sender.close()


def test_the_mismatch_of_fresh_tokens_is_float_noise(tmp_path: Path) -> None:
    async def test(client: EngineClient, url: str, token: str, trainer: Trainer) -> None:
        for version in (0, 1):
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.mul_(1.1)
            await trainer.publish(client, version)
            draw = np.random.default_rng(version)
            prompts = [draw.integers(SPECIALS, trainer.vocab_size, size).tolist() for size in (3, 40, 17, 8)]
            sampling = Sampling(max_tokens=60, seed=11)
            answers = await asyncio.gather(*(client.generate(p, sampling, stop=[1], n=4) for p in prompts))
            gaps = np.concatenate(
                [
                    trainer.logprobs(prompt, completion.tokens.tolist()) - completion.logprobs
                    for prompt, completions in zip(prompts, answers, strict=True)
                    for completion in completions
                ]
            ).astype(np.float64)
            assert len(gaps) > 100
            assert np.mean(np.expm1(gaps) - gaps) < 1e-8
            assert np.abs(gaps).max() < 1e-4

    assert running(tmp_path / "run", test) == 0


def test_the_chat_endpoint_speaks_the_models_format(tmp_path: Path) -> None:
    async def test(client: EngineClient, url: str, token: str, trainer: Trainer) -> None:
        await trainer.publish(client, 0)
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0) as chat:
            answer = await chat.chat.completions.create(
                model="qwen3", messages=[{"role": "user", "content": "higher"}], max_tokens=5, temperature=0
            )
        (choice,) = answer.choices
        assert isinstance(choice.message.content, str)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5 or choice.finish_reason == "stop"

    assert running(tmp_path / "run", test) == 0
