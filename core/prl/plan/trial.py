"""The trainer alone: its real ranks, under their agent, on batches made up by length. What `prl bench train` runs.

Waits for the ranks' hello and for their answer to each step; the agent's end ends it too, with the log's last lines.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from prl.compose.compose import Composition, create_run
from prl.compose.plan import Process, plan
from prl.dispatch.hub import Hub
from prl.dispatch.metrics import trainer_metrics
from prl.dispatch.trainer import Trainer
from prl.errors import RunError
from prl.messages import Stop
from prl.rollout.tokenizer import vocab_size_of
from prl.run_dir import RunDir
from prl.score.costs import Costs
from prl.score.pack import pack
from prl.train.layout import layout_of
from prl.types import Batch, Sample

_LAST_LINES = 12


@attrs.frozen(kw_only=True)
class Trial:
    """What is tried."""

    composition: Composition
    source: Path
    steps: Sequence[Sequence[int]]
    """Timed ones, each the tokens of its rollouts. One like the first comes before them, to warm up."""
    sampled: float
    trace: str = ""
    """Folder for a trace of one more step, like the last; empty: none."""


def run(trial: Trial) -> list[dict[str, float]]:
    """Metrics of every timed step, named as a run names them."""
    run_dir = create_run(trial.composition, trial.source)
    return asyncio.run(_run(trial, run_dir))


async def _run(trial: Trial, run_dir: RunDir) -> list[dict[str, float]]:
    async with Hub(run_dir) as hub, _trainers(trial.composition, run_dir) as ended:
        serving = asyncio.create_task(hub.serve())
        steps = asyncio.create_task(_steps(trial, hub, trial.composition.run.trainer.ranks))
        try:
            # A rank that failed tells the hub why; one that was killed ends the agent.
            await asyncio.wait({steps, serving, ended}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                await serving
            if not steps.done():
                raise RunError(await ended)
            return await steps
        finally:
            await _cancelled(serving, steps)


async def _cancelled(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _steps(trial: Trial, hub: Hub, ranks: int) -> list[dict[str, float]]:
    workers = [await hub.hello("trainer", rank) for rank in range(ranks)]
    peers = [peer for peer, _ in workers]
    trainer = Trainer(hub, peers)
    found = []
    steps = [trial.steps[0], *trial.steps, *([trial.steps[-1]] if trial.trace else [])]
    for number, lengths in enumerate(steps):
        traced = trial.trace if trial.trace and number == len(steps) - 1 else ""
        batch = _batch(trial, lengths, number, workers[0][1].costs)
        reports = await trainer.step(batch, learning_rate=1e-6, publish=False, trace=traced)
        found.append(trainer_metrics(batch, reports))
    for peer in peers:
        await hub.send(peer, Stop())
    return found[1 : 1 + len(trial.steps)]


@asynccontextmanager
async def _trainers(composition: Composition, run_dir: RunDir) -> AsyncIterator[asyncio.Task[str]]:
    """The trainer's processes; the task ends, with a sentence, when the first of them does."""
    chosen = [process for process in plan(composition, run_dir).processes if process.role == "trainer"]
    started = [await _start(process, run_dir) for process in chosen]
    ended = asyncio.create_task(_first_end(started, run_dir))
    try:
        yield ended
        await asyncio.gather(*(process.wait() for process, _ in started))
    finally:
        ended.cancel()
        for process, _ in started:
            if process.returncode is None:
                process.terminate()


async def _start(process: Process, run_dir: RunDir) -> tuple[asyncio.subprocess.Process, Path]:
    log = run_dir.logs(1) / f"{process.name}.log"
    with log.open("wb") as file:
        environment = {**os.environ, **process.env}
        child = await asyncio.create_subprocess_exec(*process.argv, env=environment, stdout=file, stderr=file)
    return child, log


async def _first_end(started: Sequence[tuple[asyncio.subprocess.Process, Path]], run_dir: RunDir) -> str:
    waits = [asyncio.ensure_future(process.wait()) for process, _ in started]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    which = next(index for index, wait in enumerate(waits) if wait.done())
    log = started[which][1]
    lines = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
    return "\n".join([f"the trainer ended with exit code {waits[which].result()}; {log} ends with", *lines])


# --- batches ----------------------------------------------------------------------------------------------------------
def _batch(trial: Trial, lengths: Sequence[int], number: int, costs: Costs) -> Batch:
    """The batch of one step: rollouts whose beginning is given and whose rest the policy sampled."""
    run = trial.composition.run
    draw = np.random.default_rng((run.run.seed, number))
    vocabulary = vocab_size_of(trial.composition)
    return pack(
        [_sample(draw, length, vocabulary, trial.sampled, number) for length in lengths],
        step=number + 1,
        version=number,
        phase="rl",
        ranks=run.trainer.ranks,
        micro_batch_tokens=run.trainer.micro_batch_tokens,
        context=layout_of(run.trainer).context,
        costs=costs,
    )


def _sample(draw: np.random.Generator, length: int, vocabulary: int, share: float, version: int) -> Sample:
    sampled = np.arange(length) >= max(1, round(length * (1 - share)))
    weights = sampled.astype(np.float32)
    return Sample(
        tokens=draw.integers(0, vocabulary, length).astype(np.int32),
        sampled=sampled,
        engine_logprobs=np.where(sampled, -np.log(vocabulary), 0.0).astype(np.float32),
        versions=np.where(sampled, version, -1).astype(np.int32),
        advantages=weights * np.float32(draw.standard_normal()),
        temperature=1.0,
        weights={"rl": weights},
    )
