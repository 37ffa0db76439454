"""The engines of one run as the local launcher would start them, each with a device of its own; no controller."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import attrs
import numpy as np
import torch
from prl.blocks import rounding
from prl.blocks.context import Context
from prl.blocks.linear import linear
from prl.compose.compose import Composition, compose, create_run
from prl.compose.plan import plan
from prl.dispatch.hub import Hub
from prl.providers import Model
from prl.run_dir import RunDir
from prl.types import Manifest
from prl_local.devices import divided
from prl_local.launcher import LocalProcess, spawn

from tests.plugins.served_vllm import Background, Served, Trainer


@attrs.define(eq=False)
class Fleet:
    """Engines, and what publishes to them."""

    composition: Composition
    run_dir: RunDir
    processes: list[LocalProcess]
    background: Background
    hub: Hub
    trainer: Trainer
    engines: list[Served] = attrs.field(factory=list)

    @classmethod
    @contextmanager
    def started(
        cls, background: Background, base: Path, place: Path, edits: Sequence[str], devices: Sequence[str]
    ) -> Iterator[Fleet]:
        """Started, not waited for; ended when the block is left."""
        composition = compose(base, overrides=[f'run.dir="{place}"', *edits])
        run_dir = create_run(composition, base)
        engines = [process for process in plan(composition, run_dir).processes if process.role == "engine"]
        hub = Hub(run_dir)
        background.run(hub.__aenter__())
        serving = asyncio.run_coroutine_threadsafe(hub.serve(), background.loop)
        place.mkdir(parents=True, exist_ok=True)
        processes = [spawn(process, place / f"{process.name}.log") for process in divided(engines, devices)]
        fleet = cls(composition, run_dir, processes, background, hub, Trainer(composition, run_dir))
        try:
            yield fleet
        finally:
            for engine in fleet.engines:
                background.run(engine.client.aclose())
            for process in processes:
                with suppress(ProcessLookupError):
                    process.terminate()
            for process in processes:
                with suppress(subprocess.TimeoutExpired):
                    process.popen.wait(10)
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            serving.cancel()
            fleet.trainer.sender.close()

    def wait(self, seconds: float) -> None:
        """Until all engines serve; RuntimeError with the last words of one that does not."""
        connect: Any = self.composition.load(self.composition.provider(self.composition.run.engine).connect)  # type: ignore[attr-defined]
        for index, process in enumerate(self.processes):
            try:
                _, hello = self.background.run(self._hello(index, process), timeout=seconds)
            except TimeoutError:
                raise RuntimeError(f"engine {index} of {self.run_dir.path.name} was not ready in time") from None
            token = self.run_dir.token()
            self.engines.append(
                Served(
                    background=self.background,
                    client=connect(hello.url, token),
                    trainer=self.trainer,
                    url=hello.url,
                    token=token,
                    stopped=process.wait,
                    ended=process.wait,
                )
            )

    async def _hello(self, index: int, process: LocalProcess) -> Any:
        hello = asyncio.create_task(self.hub.hello("engine", index))
        while not hello.done():
            if process.popen.poll() is not None:
                raise RuntimeError(
                    f"engine {index} of {self.run_dir.path.name} ended with exit code {process.popen.returncode}"
                )
            await asyncio.wait({hello}, timeout=0.2)
        return hello.result()

    def round(self) -> None:
        """The trainer's modules compute with weights as engines see them."""
        composition = self.composition
        run, provider = composition.run, cast(Model, composition.provider(composition.run.model))
        weight_map = composition.load(provider.weights)(run.model, self.trainer.vocab_size)
        number_format = composition.build(run.quantization)
        rounding.install(self.trainer.model, weight_map, number_format, unquantized=provider.unquantized)

    @torch.no_grad()
    def logprobs(self, prompts: Sequence[list[int]], sampled: Sequence[list[int]]) -> list[np.ndarray]:
        """What the trainer's modules give each sampled token: all sequences in one pass."""
        rows = [torch.tensor([*prompt, *tokens]) for prompt, tokens in zip(prompts, sampled, strict=True)]
        ends = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
        model: Any = self.trainer.model
        hidden = model.hidden(torch.cat(rows), Context.packed(ends))
        scores = linear(hidden, model.head()).log_softmax(-1)
        return [
            scores[end - len(tokens) - 1 : end - 1].gather(1, torch.tensor(tokens)[:, None])[:, 0].numpy()
            for end, tokens in zip(ends[1:].tolist(), sampled, strict=True)
        ]

    def publish(self, version: int, seed: int) -> Manifest:
        """New weights, served by every engine."""
        self.trainer.change(seed)
        manifest = self.trainer.send(version)
        for engine in self.engines:
            engine.run(engine.serve(manifest))
        return manifest
